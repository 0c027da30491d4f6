/* The shell: head, tabs, the strip of passes, search, keys, theme. */

function tabs() {
  return [['passes', 'Passes', passesTab], ['precision', 'Integer / float', precisionTab], ['layers', 'Layers', layersTab], ['grids', 'Grids', gridsTab],
    D.sensitivity && ['sensitivity', 'Sensitivity', sensitivityTab], $('extra').content.childElementCount > 0 && ['pruning', 'Pruning', () => h('div', { class: 'wide' }, document.importNode($('extra').content, true))],
    ['proof', D.bisect ? 'Verification, bisection' : 'Verification', proofTab], ['about', 'About', aboutTab]].filter(Boolean);
}

/* A row of buttons of which one is chosen: arrows, Home and End move; only the chosen one is in the tab order. */
function chooser(label, role, entries, chosen, choose, attributes = {}) {
  const part = role === 'tablist' ? 'tab' : 'radio', mark = part === 'tab' ? 'aria-selected' : 'aria-checked';
  const buttons = entries.map(([id, content, extra], i) => h('button', { type: 'button', role: part, [mark]: id === chosen, tabindex: id === chosen ? 0 : -1, 'data-value': id, onclick: () => choose(id), ...extra }, content));
  const list = h('div', { role, 'aria-label': label, ...attributes, onkeydown: (e) => {
    const at = buttons.indexOf(document.activeElement), step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
    const to = e.key === 'Home' ? 0 : e.key === 'End' ? buttons.length - 1 : step ? at + step : -1;
    if (at < 0 || to < 0 || to >= buttons.length) return;
    e.preventDefault();
    e.stopPropagation();
    choose(entries[to][0]);
    const again = list.isConnected ? buttons[to] : document.querySelector(`[role="${role}"][aria-label="${label}"] [data-value="${entries[to][0]}"]`);
    if (again) again.focus();
  } }, buttons);
  list.mark = (value) => buttons.forEach((b) => { const on = b.dataset.value === String(value); b.setAttribute(mark, on); b.tabIndex = on ? 0 : -1; });
  return list;
}

function movedText(pass) {
  if (pass.moved === null) return '';
  return pass.moved === 0 ? 'output equal' : 'moved ' + (typeof pass.moved === 'number' ? pass.moved.toExponential(1) : num(pass.moved));
}

function strip() {
  const entries = section().passes.map((p, i) => [i, [
    h('span', { class: 'name' }, p.name), h('span', { class: 'what' }, i ? `${p.rewrites} rewrite${p.rewrites === 1 ? '' : 's'} · ${p.ms.toFixed(p.ms < 10 ? 1 : 0)} ms` : `${section().states[0].length} nodes · ${p.ms.toFixed(0)} ms`),
    h('span', { class: 'what' }, movedText(p) || (marks(i).size ? '' : i ? 'no change' : ''), p.skips.length > 0 && h('span', { class: 'badge', title: 'places left alone' }, p.skips.length + ' left alone'))], { class: 'pass' + (i && !marks(i).size ? ' idle' : '') }]);
  return chooser('Passes', 'tablist', entries, S.pass, choosePass, { class: 'strip', id: 'strip' });
}

function choosePass(i) {
  S.pass = Math.max(0, Math.min(section().passes.length - 1, Number(i)));
  if (S.tab !== 'passes') { chooseTab('passes'); return; }
  $('strip').mark(S.pass);
  const button = $('strip').querySelector('[aria-selected="true"]'), box = $('strip');
  box.scrollLeft = button.offsetLeft - (box.clientWidth - button.clientWidth) / 2;
  stage();
  panel();
  announce(`pass ${section().passes[S.pass].name}`);
}

function passesTab() {
  fill($('over'), strip());
  return h('div', { id: 'stage' });
}

function stage() {
  const s = section(), pass = s.passes[S.pass], found = marks(S.pass), count = (k) => [...found.values()].filter((v) => v === k).length;
  const views = [['graph', 'Graph'], ['diff', 'Diff'], ['numbers', 'Numbers'], ['skips', `Left alone (${pass.skips.length})`]];
  fill($('stage'),
    h('div', { class: 'stagehead' },
      h('h2', {}, pass.name), h('span', { class: 'muted' }, S.pass ? [['added', '+'], ['removed', '−'], ['changed', '~']].filter(([k]) => count(k)).map(([k, sign]) => h('span', { class: 'mark ' + k }, `${sign}${count(k)} ${k} `)) : 'the captured graph', S.pass && !found.size ? 'changed nothing' : ''),
      chooser('What to show of the pass', 'tablist', views, S.view, (v) => { S.view = v; stage(); }, { class: 'segments' })),
    { graph: graphView, diff: diffView, numbers: numbersView, skips: skipsView }[S.view]());
  if (S.view === 'graph') drawGraph();
}

function graphView() {
  const button = (label, text, act) => h('button', { type: 'button', 'aria-label': label, title: label, onclick: act }, text);
  const states = [['changes', 'Changes'], ['before', 'Before'], ['after', 'After']];
  const drawn = section().passes[S.pass].layout !== null;
  const depth = drawn ? Math.max(0, ...[...allGroups()].map((g) => g.split('.').length)) : 0;
  return h('div', { class: 'graphview' },
    h('div', { class: 'tools' },
      S.pass > 0 && chooser('Which state of the graph', 'radiogroup', states, S.state, (v) => { S.state = v; stage(); }, { class: 'segments' }),
      h('span', { class: 'buttons' }, button('Zoom in', '+', () => zoom(1.3)), button('Zoom out', '−', () => zoom(1 / 1.3)), button('Fit the whole graph', 'Fit', fit)),
      depth > 0 && h('label', {}, 'Modules ', h('select', { id: 'depth', onchange: (e) => {
        if (e.target.value === 'unchanged') foldUnchanged(); else if (e.target.value === 'all') { S.collapsed.clear(); drawGraph(); } else foldDepth(Number(e.target.value));
      } }, h('option', { value: 'all' }, 'expanded'), S.pass > 0 && h('option', { value: 'unchanged' }, 'collapse unchanged'), Array.from({ length: depth }, (_, i) => h('option', { value: i + 1 }, `collapse at depth ${i + 1}`)))),
      drawn && h('label', {}, 'Label ', h('select', { id: 'label', onchange: (e) => { S.label = e.target.value; drawGraph(true); } },
        Object.entries(LABELS).filter(([k]) => measured() || (k !== 'sqnr' && k !== 'total')).map(([k, [text]]) => h('option', { value: k, selected: k === S.label }, text))))),
    h('div', { id: 'graph', class: 'graph', tabindex: 0, role: 'group', 'aria-roledescription': 'graph', 'aria-label': `Graph at ${section().passes[S.pass].name}. Arrow keys walk along the edges, plus and minus zoom, 0 fits, c collapses, e expands.`, ...mouse(), onkeydown: graphKey }),
    h('div', { class: 'key' }, h('span', { class: 'swatch int' }), 'integer', h('span', { class: 'swatch float' }), 'float', S.pass > 0 && [h('span', { class: 'mark added' }, '+ added'), h('span', { class: 'mark removed' }, '− removed'), h('span', { class: 'mark changed' }, '~ changed')], h('span', { class: 'muted' }, 'double click: collapse or expand')));
}

function graphKey(e) {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  const module = () => { const row = S.node && rowOf(S.node); return row && G.own ? G.own.get(S.node) : ''; };
  const acts = { '+': () => zoom(1.3), '=': () => zoom(1.3), '-': () => zoom(1 / 1.3), 0: fit, c: () => module() && fold(ancestors(module()).find((g) => S.collapsed.has(g)) ? ancestors(module())[0] : module(), true),
    e: () => { const g = ancestors(module()).find((a) => S.collapsed.has(a)); if (g) fold(g, false); }, Enter: () => S.node && $('panel').querySelector('h2').focus() };
  if (e.key.startsWith('Arrow')) walk(e.key); else if (acts[e.key]) acts[e.key](); else return;
  e.preventDefault();
}

/* One pointer pans, two zoom, the wheel zooms; a click that did not move chooses. */
function mouse() {
  const points = new Map();
  let moved = 0, gap = 0;
  const item = (e) => { const g = e.target.closest && e.target.closest('.node'); return g ? G.items.get(g.dataset.id) : null; };
  const spread = () => { const [a, b] = [...points.values()]; return Math.hypot(a[0] - b[0], a[1] - b[1]); };
  return {
    onpointerdown: (e) => { points.set(e.pointerId, [e.clientX, e.clientY]); moved = 0; if (points.size === 2) gap = spread(); },
    onpointermove: (e) => {
      const old = points.get(e.pointerId);
      if (!old) return;
      points.set(e.pointerId, [e.clientX, e.clientY]);
      moved += Math.abs(e.clientX - old[0]) + Math.abs(e.clientY - old[1]);
      if (moved > 4 && !e.currentTarget.hasPointerCapture(e.pointerId)) e.currentTarget.setPointerCapture(e.pointerId);
      if (points.size === 1) { G.x += e.clientX - old[0]; G.y += e.clientY - old[1]; place(); }
      if (points.size === 2) { const next = spread(), r = e.currentTarget.getBoundingClientRect(), p = [...points.values()]; zoom(next / (gap || next), (p[0][0] + p[1][0]) / 2 - r.left, (p[0][1] + p[1][1]) / 2 - r.top); gap = next; }
    },
    onpointerup: (e) => { if (points.delete(e.pointerId) && moved <= 4) { const i = item(e); if (i) { select(i.row ? i.row[NAME] : i.members[0]); } } },
    onpointercancel: (e) => points.delete(e.pointerId),
    ondblclick: (e) => { const i = item(e); if (!i) return; if (i.group) fold(i.group, false); else if (G.own.get(i.id)) fold(G.own.get(i.id), true); },
    onwheel: (e) => { e.preventDefault(); const r = e.currentTarget.getBoundingClientRect(); zoom(Math.exp(-e.deltaY * (e.deltaMode ? 0.05 : 0.0016)), e.clientX - r.left, e.clientY - r.top); },
  };
}

function chooseTab(id) {
  S.tab = id;
  $('tabs').mark(id);
  const [, , make] = tabs().find((t) => t[0] === id);
  fill($('over'));
  fill($('main'), make());
  if (id === 'passes') { stage(); $('strip').scrollLeft = Math.max(0, $('strip').querySelector('[aria-selected="true"]').offsetLeft - 60); }
}

function searchBox() {
  const list = h('ul', { id: 'found', role: 'listbox', 'aria-label': 'Nodes found', hidden: true }), input = h('input', { id: 'search', type: 'search', role: 'combobox', autocomplete: 'off', placeholder: 'Search a node  /', 'aria-label': 'Search a node', 'aria-expanded': 'false', 'aria-controls': 'found' });
  let hits = [], at = -1;
  const close = () => { list.hidden = true; input.setAttribute('aria-expanded', 'false'); input.removeAttribute('aria-activedescendant'); };
  const mark = () => { [...list.children].forEach((li, i) => li.setAttribute('aria-selected', i === at)); if (list.children[at]) { input.setAttribute('aria-activedescendant', 'found-' + at); list.children[at].scrollIntoView({ block: 'nearest' }); } };
  const take = (row) => { close(); S.query = ''; input.value = ''; select(row[NAME], { centre: true, show: true }); ($('graph') || $('panel').querySelector('h2')).focus({ preventScroll: true }); };
  input.addEventListener('input', () => {
    S.query = input.value.trim();
    const query = S.query.toLowerCase(), all = new Map([...nodes(section().final), ...nodes(S.pass - 1), ...nodes(S.pass)]);
    hits = query ? [...all.values()].filter((r) => matches(r, query)).sort((a, b) => a[NAME].length - b[NAME].length).slice(0, 40) : [];
    at = hits.length ? 0 : -1;
    fill(list, hits.map((r, i) => h('li', { id: 'found-' + i, role: 'option', onpointerdown: (e) => { e.preventDefault(); take(r); } }, h('span', { class: 'mono' }, r[NAME]), h('span', { class: 'muted' }, ' ' + r[KIND] + (r[PATH] ? ' · ' + r[PATH] : '')))), query && !hits.length && h('li', { class: 'muted' }, 'nothing found'));
    list.hidden = !query;
    input.setAttribute('aria-expanded', String(Boolean(query)));
    mark();
    if (G.svg) highlight();
  });
  input.addEventListener('keydown', (e) => {
    if (e.key === 'ArrowDown' || e.key === 'ArrowUp') { e.preventDefault(); at = Math.max(0, Math.min(hits.length - 1, at + (e.key === 'ArrowDown' ? 1 : -1))); mark(); }
    if (e.key === 'Enter' && hits[at]) { e.preventDefault(); take(hits[at]); }
  });
  input.addEventListener('blur', close);
  return h('div', { class: 'search' }, input, list);
}

function theme() {
  const root = document.documentElement, dark = matchMedia('(prefers-color-scheme: dark)'), button = h('button', { class: 'icon', type: 'button', id: 'theme', 'aria-label': 'Switch between light and dark', onclick: () => { root.dataset.theme = root.dataset.theme === 'dark' ? 'light' : 'dark'; show(); } });
  const show = () => { button.textContent = root.dataset.theme === 'dark' ? '☀' : '☾'; };
  const follow = () => { root.dataset.theme = dark.matches ? 'dark' : 'light'; show(); };
  dark.addEventListener('change', follow);
  follow();
  return button;
}

function keys(e) {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName);
  if (e.key === 'Escape') {
    if (S.query || $('search').value) { S.query = ''; $('search').value = ''; $('search').dispatchEvent(new Event('input')); } else if (S.node) select(null); else document.activeElement.blur();
    return;
  }
  if (typing || e.ctrlKey || e.metaKey || e.altKey) return;
  if (e.key === '/') { e.preventDefault(); $('search').focus(); }
  if (e.key === '[' || e.key === ']') choosePass(S.pass + (e.key === ']' ? 1 : -1));
}

function summary() {
  const s = section(), ops = [...nodes(s.final).values()].filter((r) => !QUIET.has(r[KIND])), sum = (key) => s.layers.reduce((n, l) => n + l[key], 0), whole = sum('macs');
  const inside = s.layers.filter((l) => l.runs === 'int').reduce((n, l) => n + l.macs, 0);
  const tile = (label, value, note, kind = '') => h('div', { class: 'stat ' + kind }, h('span', { class: 'label' }, label), h('b', {}, value), h('span', { class: 'muted' }, note));
  return h('div', { class: 'stats' },
    tile('scheme', D.scheme, D.target), tile('integer operations', `${ops.filter((r) => r[RUNS] === 'int').length} of ${ops.length}`, `${percent(inside, whole)} of the MACs`),
    tile('weights', byteText(sum('bytes')), `${percent(sum('bytes'), s.float_bytes)} of float32`), tile('MACs', short(whole), `${s.layers.length} layers, ${s.passes.length} passes`),
    D.proof ? tile('verification', D.proof.ok ? 'equal' : 'differs', D.proof.text.split('\n')[0], D.proof.ok ? 'good' : 'bad') : tile('verification', 'not run', 'proof= or --verify'));
}

function begin() {
  for (const s of D.sections) prepare(s);
  const open = () => { S.pass = section().passes.findIndex((_, i) => marks(i).size); S.pass = Math.max(0, S.pass); S.node = null; S.collapsed = new Set(); };
  open();
  const parts = D.sections.length > 1 && h('select', { id: 'section', 'aria-label': 'Part of the model', onchange: (e) => { S.section = Number(e.target.value); open(); fill($('summary'), summary()); chooseTab(S.tab); panel(); } }, D.sections.map((s, i) => h('option', { value: i }, s.name || 'model')));
  const all = tabs();
  fill($('app'),
    h('header', {}, h('div', { class: 'title' }, h('h1', {}, D.title), parts), searchBox(), theme()),
    h('div', { id: 'summary' }, summary()),
    Object.assign(chooser('Parts of the report', 'tablist', all.map(([id, label]) => [id, label, { 'aria-controls': 'main' }]), S.tab, chooseTab, { class: 'tabs', id: 'tabs' })),
    h('div', { id: 'over' }),
    h('div', { class: 'columns' }, h('main', { id: 'main', role: 'tabpanel', 'aria-label': 'Report' }), h('aside', { id: 'panel', 'aria-label': 'Chosen node', tabindex: -1 })),
    h('div', { id: 'live', class: 'hidden', 'aria-live': 'polite' }));
  onSelect((name, options) => {
    if (name && options.show && S.tab === 'passes' && !nodes(S.pass).has(name) && !nodes(S.pass - 1).has(name)) choosePass(section().states.findIndex((_, i) => nodes(i).has(name)));
    if (options.show && !options.stay && S.tab === 'passes' && S.view !== 'graph') { S.view = 'graph'; stage(); }
    panel();
    if (G.svg && G.svg.isConnected) { highlight(); const item = name && options.centre && reveal(name); if (item) centre(item); }
    if (name && matchMedia('(max-width: 900px)').matches) $('panel').scrollIntoView({ block: 'start', behavior: 'smooth' });
  });
  document.addEventListener('keydown', keys);
  chooseTab('passes');
  panel();
  document.body.dataset.ready = 'yes';
}

decode($('data').textContent).then((data) => { D = data; begin(); }).catch((error) => {
  fill($('app'), h('p', { class: 'pad' }, 'This browser cannot show the report: ' + error));
  throw error;
});
