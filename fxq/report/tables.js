/* Tables that sort and filter, and the tabs that are made of them. */

const MOST_ROWS = 5000;

/* columns: {title, value(row), show(row), right, className}; the first click on a number column sorts it downwards */
function table(columns, rows, options = {}) {
  let order = options.order || null, query = '', pick = options.pick ? 'all' : null;
  const body = h('tbody', {}), count = h('span', { class: 'muted', 'aria-live': 'polite' });
  const draw = () => {
    let list = rows.filter((r) => (!query || columns.some((c) => String(c.value(r)).toLowerCase().includes(query))) && (!pick || pick === 'all' || options.pick(r) === pick));
    if (order) {
      const [i, sign] = order, value = columns[i].value;
      list = [...list].sort((a, b) => { const x = value(a), y = value(b); return sign * (typeof x === 'number' && typeof y === 'number' ? x - y || 0 : String(x).localeCompare(String(y))); });
    }
    count.textContent = list.length === rows.length ? `${rows.length} row${rows.length === 1 ? '' : 's'}` : `${list.length} of ${rows.length} rows`;
    fill(body, list.slice(0, MOST_ROWS).map((r) => h('tr', { class: options.rowClass ? options.rowClass(r) : null }, columns.map((c) => h('td', { class: [c.right ? 'n' : '', c.className || ''].join(' ').trim() || null }, c.show ? c.show(r) : String(c.value(r)))))));
    heads.forEach((t, i) => t.setAttribute('aria-sort', order && order[0] === i ? (order[1] > 0 ? 'ascending' : 'descending') : 'none'));
  };
  const heads = columns.map((c, i) => h('th', { scope: 'col', class: c.right ? 'n' : null }, h('button', { type: 'button', title: c.help || null, onclick: () => { order = order && order[0] === i ? [i, -order[1]] : [i, c.right && !c.rising ? -1 : 1]; draw(); } }, c.title)));
  const bar = h('div', { class: 'bar' },
    h('input', { type: 'search', placeholder: 'Filter', 'aria-label': 'Filter rows', oninput: (e) => { query = e.target.value.toLowerCase(); draw(); } }),
    options.picks && h('select', { 'aria-label': 'Which rows', onchange: (e) => { pick = e.target.value; draw(); } }, options.picks.map(([value, label]) => h('option', { value }, label))), count);
  draw();
  return h('div', { class: 'tableblock' }, !options.bare && bar, h('div', { class: 'wide' }, h('table', { id: options.id || null }, h('thead', {}, h('tr', {}, heads)), body)));
}

const bar = (value, most, kind = '') => h('span', { class: 'meter ' + kind, 'aria-hidden': 'true' }, h('span', { style: `width:${most > 0 ? Math.max(0, Math.min(100, (100 * value) / most)).toFixed(1) : 0}%` }));
const withBar = (text, value, most, kind) => [h('span', { class: 'barred' }, text), bar(value, most, kind)];
const runsChip = (runs) => (runs ? h('span', { class: 'chip ' + runs }, runs === 'int' ? 'integer' : 'float') : h('span', { class: 'muted' }, '–'));

function chart(svg, label) {
  if (!svg) return null;
  const parsed = new DOMParser().parseFromString(svg, 'image/svg+xml').documentElement;
  const image = document.importNode(parsed, true);
  image.removeAttribute('width');
  image.removeAttribute('height');
  image.setAttribute('role', 'img');
  image.setAttribute('aria-label', label);
  return h('figure', { class: 'chart' }, image);
}

const QUIET = new Set(['input', 'output', 'attr', 'getitem', 'fake_quantize']);

function precisionTab() {
  const s = section(), cost = new Map(s.layers.map((l) => [l.node, l]));
  const ops = [...nodes(s.final).values()].filter((r) => !QUIET.has(r[KIND]));
  const kinds = new Map();
  for (const r of ops) { const k = kinds.get(r[KIND]) || { kind: r[KIND], int: 0, float: 0 }; if (r[RUNS] === 'int') k.int++; else k.float++; kinds.set(r[KIND], k); }
  const macs = (r) => (cost.get(r[NAME]) || { macs: 0 }).macs, whole = s.layers.reduce((n, l) => n + l.macs, 0), most = Math.max(1, ...s.layers.map((l) => l.macs));
  return [
    h('h2', {}, 'Integer or float'),
    h('p', { class: 'lead' }, `${ops.filter((r) => r[RUNS] === 'int').length} of ${ops.length} operations run in integers on ${D.target}; they hold ${percent(ops.filter((r) => r[RUNS] === 'int').reduce((n, r) => n + macs(r), 0), whole)} of the multiply-accumulates.`),
    h('div', { class: 'tally' }, [...kinds.values()].sort((a, b) => b.int + b.float - a.int - a.float).map((k) => h('span', { class: 'tile' }, h('b', {}, k.kind), k.int > 0 && h('span', { class: 'chip int' }, k.int + ' int'), k.float > 0 && h('span', { class: 'chip float' }, k.float + ' float')))),
    table([
      { title: 'operation', value: (r) => r[PATH] || r[NAME], show: (r) => nodeLink(r[NAME], { stay: true }, r[PATH]) },
      { title: 'kind', value: (r) => r[KIND] },
      { title: 'runs', value: (r) => r[RUNS], show: (r) => runsChip(r[RUNS]) },
      { title: 'MACs', value: macs, right: true, show: (r) => (macs(r) ? withBar(short(macs(r)), macs(r), most, r[RUNS]) : '') },
      { title: 'why float', value: (r) => r[WHY], className: 'reason' },
    ], ops, { id: 'precision', pick: (r) => (r[RUNS] === 'int' ? 'int' : 'float'), picks: [['all', 'all operations'], ['int', 'integer'], ['float', 'float']] })];
}

function layersTab() {
  const s = section(), sum = (key) => s.layers.reduce((n, l) => n + l[key], 0), most = (key) => Math.max(1, ...s.layers.map((l) => l[key]));
  const column = (title, key, text) => ({ title, value: (l) => l[key], right: true, show: (l) => withBar(text(l[key]), l[key], most(key), l.runs) });
  return [
    h('h2', {}, 'Bytes and multiply-accumulates by layer'),
    h('p', { class: 'lead' }, `${short(sum('macs'))} MACs for one input; ${short(sum('parameters'))} parameters in ${byteText(sum('bytes'))}, ${percent(sum('bytes'), s.float_bytes)} of ${byteText(s.float_bytes)} in float32.`),
    h('p', { class: 'key' }, h('span', { class: 'swatch int' }), 'integer', h('span', { class: 'swatch float' }), 'float'),
    chart(s.charts.costs, 'Multiply-accumulates and bytes of each layer in the order of the graph'),
    table([
      { title: 'layer', value: (l) => l.path, show: (l) => nodeLink(l.node, { stay: true }, l.path) },
      { title: 'kind', value: (l) => l.kind }, { title: 'runs', value: (l) => l.runs, show: (l) => runsChip(l.runs) },
      { title: 'channels', value: (l) => `${l.in} → ${l.out}` + (l.groups > 1 ? ` /${l.groups}` : ''), className: 'mono' },
      column('MACs', 'macs', short), column('parameters', 'parameters', short), { title: 'bits', value: (l) => l.bits, right: true }, column('bytes', 'bytes', byteText),
      { title: 'weight grid', value: (l) => l.grid, className: 'mono' }, { title: 'weight SQNR dB', value: (l) => asNumber(l.sqnr), right: true, rising: true, show: (l) => db(l.sqnr) },
    ], s.layers, { id: 'layers' })];
}

function gridsTab() {
  const s = section(), list = s.states[s.final].map((id) => s.rows[id][NAME]).filter((n) => s.activations[n] && s.activations[n].grid).map((n) => ({ node: n, ...s.activations[n], share: (s.activations[n].below + s.activations[n].above) / Math.max(1, s.activations[n].n) }));
  const most = Math.max(...list.map((g) => g.share), 1e-9);
  return [
    h('h2', {}, 'Activation grids and what they clip'),
    s.note && h('p', { class: 'note' }, s.note),
    list.length > 0 && h('p', { class: 'lead' }, `${list.length} values are rounded onto grids; ${list.filter((g) => g.share > 0).length} of them lose values at the ends, at most ${percent(most > 1e-9 ? most : 0, 1)}. Clamps that a grid stands for (ReLU) do not count as clipping.`),
    !list.length && !s.note && h('p', { class: 'lead' }, 'No value of this graph is rounded onto a grid.'),
    chart(s.charts.clipping, 'Share of the values that each grid clips, and the SQNR of rounding onto it'),
    list.length > 0 && table([
      { title: 'value', value: (g) => g.node, show: (g) => nodeLink(g.node, { stay: true }) },
      { title: 'grid', value: (g) => g.grid.text, className: 'mono' },
      { title: 'seen', value: (g) => g.hi - g.lo, show: (g) => `${num(g.lo, 3)} … ${num(g.hi, 3)}`, right: true, className: 'mono' },
      { title: 'grid ends', value: (g) => g.grid.hi - g.grid.lo, show: (g) => `${num(g.grid.lo, 3)} … ${num(g.grid.hi, 3)}`, right: true, className: 'mono' },
      { title: 'clipped', value: (g) => g.share, right: true, show: (g) => withBar(percent(g.share, 1), g.share, most, 'bad') },
      { title: 'absorbed', value: (g) => g.absorbed / Math.max(1, g.n), right: true, show: (g) => (g.absorbed ? percent(g.absorbed, g.n) : '') },
      { title: 'SQNR dB', value: (g) => asNumber(g.sqnr), right: true, rising: true, show: (g) => db(g.sqnr) },
    ], list, { id: 'grids' })];
}

function sensitivityTab() {
  const rows = D.sensitivity.rows, metric = D.sensitivity.metric, dropped = rows.some((r) => r[4] !== null), last = [...nodes(section().final).values()], finite = rows.map((r) => asNumber(r[2])).filter(Number.isFinite), top = Math.max(...finite, 1);
  return [h('h2', {}, 'Sensitivity'), h('p', { class: 'lead' }, 'SQNR of the output when only this one is quantized, and when all but this one are. The most sensitive is first.'),
    table([
      { title: 'rank', value: (r) => rows.indexOf(r) + 1, right: true, rising: true },
      { title: 'name', value: (r) => r[0], show: (r) => { const row = nodes(section().final).get(r[0]) || last.find((n) => n[PATH] === r[0]) || last.find((n) => n[GRID] === r[0]); return row ? nodeLink(row[NAME], { stay: true }, r[0]) : h('span', { class: 'mono' }, r[0]); } },
      { title: 'what', value: (r) => r[1] },
      { title: 'alone dB', value: (r) => asNumber(r[2]), right: true, rising: true, show: (r) => withBar(db(r[2]), Number.isFinite(asNumber(r[2])) ? asNumber(r[2]) : asNumber(r[2]) > 0 ? top : 0, top, 'int') },
      { title: 'all but it dB', value: (r) => asNumber(r[3]), right: true, show: (r) => db(r[3]) },
      ...(dropped ? [[4, 'alone'], [5, 'all but it']].map(([i, text]) => ({ title: `${metric} lost, ${text}`, value: (r) => asNumber(r[i]), right: true, show: (r) => num(r[i], 3) })) : []),
    ], rows, { id: 'sensitivity' })];
}

function proofTab() {
  return [h('h2', {}, 'Verification'),
    D.proof ? [h('p', { class: 'lead' }, h('span', { class: 'chip ' + (D.proof.ok ? 'good' : 'bad') }, D.proof.ok ? 'verified' : 'differs')), h('pre', { class: 'text', id: 'proof' }, D.proof.text)]
      : h('p', { class: 'note' }, 'The artifact was not verified for this report: pass proof=m.verify(...), or --verify on the command line.'),
    D.bisect && [h('h2', {}, 'Bisection'), h('pre', { class: 'text', id: 'bisect' }, D.bisect.join('\n'))]];
}

function aboutTab() {
  const a = D.about, s = section();
  return [h('h2', {}, 'How it was made'), h('dl', { class: 'facts about' },
    fact('model', D.title), fact('scheme', a.scheme), fact('target', a.target), fact('command', a.command ? h('code', {}, a.command) : 'from Python'), fact('made', $('app').dataset.made),
    Object.entries(a.versions).map(([k, v]) => fact(k, v, 'mono')), fact('passes', s.passes.map((p) => p.name).join(', ')), D.notes.map((n) => fact('note', n))),
    h('h2', {}, 'Keys'), h('dl', { class: 'facts about' }, [['/', 'search a node'], ['[ and ]', 'the pass before, the next one'], ['arrows', 'on the passes: choose one; in the graph: walk along the edges'], ['+ − 0', 'in the graph: zoom, fit'], ['c, e', 'in the graph: collapse the module of the chosen node, expand it'], ['Esc', 'clear the search, then the chosen node']].map(([k, v]) => fact(k, v)))];
}
