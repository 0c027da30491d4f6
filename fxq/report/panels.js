/* The panel of one node: what it is, what happened to it, its numbers, its histograms. */

const CHART = { w: 340, h: 132, left: 4, right: 4, top: 8, bottom: 18 };

function fact(label, value, kind = '') {
  if (value === '' || value === null || value === undefined) return null;
  return [h('dt', {}, label), h('dd', { class: kind }, value)];
}

function panel() {
  const aside = $('panel');
  if (aside.dataset.node !== String(S.node)) aside.scrollTop = 0;
  aside.dataset.node = S.node;
  if (!S.node) { fill(aside, h('h2', { tabindex: -1 }, 'Node'), h('p', { class: 'muted' }, 'Choose a node in the graph, in a table or by searching (press /).'), worst()); return; }
  const name = S.node, row = rowOf(name), s = section();
  if (!row) { fill(aside, h('h2', { tabindex: -1 }, name), h('p', { class: 'muted' }, 'This name is no node of the recorded graphs.')); return; }
  const last = nodes(s.final).get(name), state = last || row, layer = s.layers.find((l) => l.node === name), seen = histogram(name), weight = s.weights[name];
  fill(aside,
    h('div', { class: 'head' }, h('h2', { tabindex: -1, class: 'mono' }, name), h('button', { class: 'icon', type: 'button', 'aria-label': 'Close the node', onclick: () => select(null) }, '×')),
    h('div', { class: 'chips' }, h('span', { class: 'chip' }, state[KIND]), state[RUNS] && h('span', { class: 'chip ' + state[RUNS] }, state[RUNS] === 'int' ? 'integer' : 'float'), !last && h('span', { class: 'chip removed' }, 'not in the compiled graph')),
    h('dl', { class: 'facts' },
      fact('path', crumbs(state[PATH]), 'mono'), fact('sizes', state[SIZES], 'mono'), fact('grid', state[GRID] && `${state[GRID]} · ${state[CODES]}`, 'mono'),
      fact('why float', state[WHY]), fact('detail', state[DETAIL], 'mono'),
      fact('reads', links(row[INPUTS])), fact('read by', links(users(name, nodes(S.pass).has(name) ? S.pass : s.final))),
      layer && fact('cost', `${short(layer.macs)} MACs, ${short(layer.parameters)} parameters at ${layer.bits} bits, ${byteText(layer.bytes)}`)),
    story(name),
    seen && tensorBlock('Values', seen[1], seen[0] === name ? (state[KIND] === 'fake_quantize' ? 'before rounding' : 'of this node') : `rounded by ${seen[0]}`),
    weight && tensorBlock('Weight', weight, weight.steps ? 'in steps of its grid' : 'as it is'));
}

function crumbs(path) {
  if (!path) return null;
  const parts = path.split('.');
  return parts.map((part, i) => {
    const group = parts.slice(0, i + 1).join('.');
    if (i === parts.length - 1) return part;
    return [h('button', { class: 'link', type: 'button', title: 'Collapse or expand ' + group, 'aria-pressed': S.collapsed.has(group), onclick: () => { fold(group, !S.collapsed.has(group)); panel(); } }, part), '.'];
  });
}

const links = (names) => (names.length ? names.slice(0, 12).map((n, i) => [i ? ', ' : '', nodeLink(n)]).concat(names.length > 12 ? [` and ${names.length - 12} more`] : []) : null);

/* Where to look first: the values that the chosen pass moved most, and the grids that lose most by rounding */
function worst() {
  const s = section(), pass = s.passes[S.pass], moved = Object.entries(pass.numbers).map(([place, v]) => [s.rows[s.states[S.pass][place]], v[0]]).filter((m) => Number.isFinite(asNumber(m[1])));
  const rounded = Object.entries(s.activations).filter(([, t]) => t.grid && Number.isFinite(asNumber(t.sqnr))).map(([name, t]) => [rowOf(name, s.final), t.sqnr]);
  const list = (title, rows) => rows.length > 0 && [h('h3', {}, title), h('table', { class: 'small' }, h('tbody', {}, rows.sort((a, b) => asNumber(a[1]) - asNumber(b[1])).slice(0, 8).map(([row, value]) => h('tr', {}, h('td', {}, nodeLink(row[NAME])), h('td', { class: 'muted' }, row[KIND]), h('td', { class: 'n' }, db(value) + ' dB')))))];
  return [list(`Moved most by ${pass.name}`, moved), list('Lowest SQNR of rounding', rounded)];
}

/* What each pass did to the node, with its numbers where they were measured */
function story(name) {
  const s = section(), lines = [];
  s.passes.forEach((pass, i) => {
    const mark = i ? marks(i).get(name) : nodes(0).has(name) ? 'traced' : undefined, values = numbers(i, name), skips = pass.skips.filter((k) => k[0] === name);
    if (!mark && !values && !skips.length) return;
    lines.push(h('tr', { class: i === S.pass ? 'here' : '' },
      h('th', { scope: 'row' }, h('button', { class: 'link', type: 'button', onclick: () => choosePass(i) }, pass.name)), h('td', {}, mark ? h('span', { class: 'mark ' + mark }, mark) : '', reordered(values), skips.map((k) => h('div', { class: 'muted' }, 'left alone: ' + k[1]))),
      measured() && (values ? values.slice(0, 4) : [null, null, null, null]).map((v, k) => h('td', { class: 'n' }, values ? (k % 3 === 0 ? db(v) : num(v, k === 1 ? 6 : 3)) : ''))));
  });
  if (!lines.length) return null;
  const head = ['pass', '', ...(measured() ? ['SQNR dB', 'cosine', 'steps', 'total dB'] : [])];
  return h('div', { class: 'wide' }, h('h3', {}, 'Through the passes'), h('table', { class: 'small', id: 'story' }, h('thead', {}, h('tr', {}, head.map((t, i) => h('th', { scope: 'col', class: i > 1 ? 'n' : '' }, t)))), h('tbody', {}, lines)),
    !measured() && h('p', { class: 'muted' }, 'Numbers after each pass are recorded by compile(..., numbers=True).'));
}

function tensorBlock(title, t, note) {
  const clipped = t.grid && t.below !== undefined ? t.below + t.above : null;
  return h('div', { class: 'tensor' }, h('h3', {}, title, h('span', { class: 'muted' }, ' ' + note)),
    drawHistogram(t, title),
    h('dl', { class: 'facts' },
      fact('range', t.values ? `${num(t.values[0])} to ${num(t.values[1])}` : `${num(t.lo)} to ${num(t.hi)}`, 'mono'),
      t.grid && fact('grid', t.grid.text, 'mono'), t.grid && !t.steps && t.grid.kind === 'affine' && fact('grid ends', `${num(t.grid.lo)} to ${num(t.grid.hi)}`, 'mono'),
      clipped !== null && fact('clipped', `${percent(clipped, t.n)} (below ${percent(t.below, t.n)}, above ${percent(t.above, t.n)})`, 'mono clipped'),
      t.absorbed ? fact('absorbed', `${percent(t.absorbed, t.n)}: a ReLU or clamp that the grid stands for`) : null,
      t.sqnr !== undefined && fact('rounding SQNR', t.sqnr === 'inf' ? 'exact' : db(t.sqnr) + ' dB', 'mono'), fact('numbers', short(t.n))));
}

/* Bars on a logarithmic scale, the grid as a band with its codes as ticks; what lies outside is cut off. */
function drawHistogram(t, title) {
  const { w, h: high, left, right, top, bottom } = CHART, g = t.grid, bars = t.bins, most = Math.max(...bars, 1), step = (t.hi - t.lo) / bars.length || 1e-9;
  const known = g && (g.kind === 'affine' || g.kind === 'float8');
  let lo = t.lo, hi = t.hi === t.lo ? t.lo + step : t.hi;
  if (known) { const span = hi - lo, most2 = Math.max(span * 1.6, 1e-12); lo = Math.max(Math.min(lo, g.lo), hi - most2 - span); hi = Math.min(Math.max(hi, g.hi), lo + 2 * most2 + span); }
  const pad = (hi - lo) * 0.02, a = lo - pad, b = hi + pad, X = (v) => left + ((v - a) / (b - a)) * (w - left - right), floor = high - bottom, Y = (n) => (n ? Math.max(2, (Math.log1p(n) / Math.log1p(most)) * (floor - top)) : 0);
  const parts = [], grid = [];
  if (known) {
    const x0 = Math.max(left, X(g.lo)), x1 = Math.min(w - right, X(g.hi));
    parts.push(h('rect', { class: 'range', x: x0, y: top - 4, width: Math.max(1, x1 - x0), height: floor - top + 4 }));
    grid.push(...ticks(g, X, floor, x0, x1), h('line', { class: 'end', x1: x0, x2: x0, y1: top - 4, y2: floor }), h('line', { class: 'end', x1, x2: x1, y1: top - 4, y2: floor }));
  }
  const width = Math.max(0.8, X(t.lo + step) - X(t.lo) - 0.4);
  let inside = '', outside = '', gone = '';
  bars.forEach((n, i) => {
    if (!n) return;
    const v = t.lo + i * step, y = Y(n), rect = `M${X(v).toFixed(1)} ${floor}v${(-y).toFixed(1)}h${width.toFixed(1)}v${y.toFixed(1)}z`;
    const out = known && (v + step < g.lo - g.step / 2 || v > g.hi + g.step / 2);
    if (out && t.clamp && (v + step <= t.clamp[0] || (t.clamp[1] !== null && v >= t.clamp[1]))) gone += rect; else if (out) outside += rect; else inside += rect;
  });
  parts.push(h('path', { class: 'bars', d: inside }), outside && h('path', { class: 'bars out', d: outside }), gone && h('path', { class: 'bars gone', d: gone }), ...grid, h('line', { class: 'axis', x1: left, x2: w - right, y1: floor, y2: floor }));
  for (const [v, anchor] of [[a + pad, 'start'], [b - pad, 'end']]) parts.push(h('text', { x: anchor === 'start' ? left : w - right, y: high - 3, 'text-anchor': anchor }, num(v, 3)));
  if (a < 0 && b > 0 && X(0) > 60 && X(0) < w - 60) parts.push(h('line', { class: 'zero', x1: X(0), x2: X(0), y1: floor, y2: floor + 4 }), h('text', { x: X(0), y: high - 3, 'text-anchor': 'middle' }, '0'));
  return h('svg', { class: 'histogram', viewBox: `0 0 ${w} ${high}`, role: 'img', 'aria-label': `${title}: ${t.n} numbers from ${num(t.lo)} to ${num(t.hi)}, heights are logarithmic` }, parts);
}

/* Lines at the codes of a grid, or at every second, fourth, ... one, so that they stay apart; below the axis closer ticks */
function ticks(g, X, floor, x0, x1) {
  if (g.kind !== 'affine') return [];
  const every = (apart) => { let n = 1; while (X(g.lo + n * g.step) - X(g.lo) < apart) n *= 2; return n; };
  const comb = (n, length) => { let path = ''; for (let i = 0; i < g.codes; i += n) { const x = X(g.lo + i * g.step); if (x >= x0 - 0.5 && x <= x1 + 0.5) path += `M${x.toFixed(1)} ${floor}v${length}`; } return path; };
  const wide = every(9), close = every(2.5), text = (n) => (n === 1 ? 'a line at every code' : `a line at every ${n}th code`);
  return [h('path', { class: 'codes lines', d: comb(wide, -(floor - 4)) }, h('title', {}, text(wide))), h('path', { class: 'codes', d: comb(close, 4) })];
}
