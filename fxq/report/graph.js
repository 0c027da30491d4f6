/* The graph: places from the layout that came with the data; collapsed modules are placed here. */

const BOX = { w: 194, h: 40, dx: 224, dy: 66 };
const G = { svg: null, view: null, items: new Map(), edges: [], scale: 1, x: 0, y: 0, drawn: '' };

function placesOf(layout) {
  if (layout.places) return layout;
  layout.places = new Map(layout.names.map((n, i) => [n, [layout.xy[2 * i] * BOX.dx, layout.xy[2 * i + 1] * BOX.dy]]));
  layout.via = new Map();
  for (const [a, b, ...points] of layout.routes) {
    const list = [];
    for (let i = 0; i < points.length; i += 2) list.push([points[i] * BOX.dx, points[i + 1] * BOX.dy]);
    layout.via.set(layout.names[a] + '\n' + layout.names[b], list);
  }
  return layout;
}

/* What is shown: node name or group -> item {id, x, y, group, members, mark, row} */
function scene() {
  const s = section(), at = S.pass, layout = placesOf(s.layouts[s.passes[at].layout]);
  const before = nodes(at - 1), after = nodes(at), mark = marks(at);
  const shown = S.state === 'before' ? before : after, names = S.state === 'changes' ? layout.names : layout.names.filter((n) => shown.has(n));
  const own = groupsOf(at, layout.names), items = new Map(), of = new Map();
  for (const name of names) {
    const outer = ancestors(own.get(name)).find((g) => S.collapsed.has(g));
    const id = outer ? 'module ' + outer : name;
    of.set(name, id);
    if (!items.has(id)) items.set(id, { id, group: outer || '', members: [], marks: {}, row: null });
    const item = items.get(id);
    item.members.push(name);
    if (mark.has(name)) item.marks[mark.get(name)] = (item.marks[mark.get(name)] || 0) + 1;
    if (!outer) item.row = (S.state === 'before' ? before : after).get(name) || before.get(name);
  }
  for (const item of items.values()) {
    if (item.group && item.members.length === 1) Object.assign(item, { group: '', row: shown.get(item.members[0]) || before.get(item.members[0]) });
  }
  const links = new Map();
  const link = (rows, which) => {
    for (const row of rows.values()) {
      if (!of.has(row[NAME])) continue;
      for (const input of row[INPUTS]) {
        const a = of.get(input), b = of.get(row[NAME]);
        if (a === undefined || a === b) continue;
        const key = a + '\n' + b, old = links.get(key);
        links.set(key, { a, b, which: old && old.which !== which ? 'both' : which });
      }
    }
  };
  if (S.state !== 'after' && at > 0) link(before, 'before');
  if (S.state !== 'before') link(after, 'after');
  const edges = [...links.values()].filter((e) => items.has(e.a) && items.has(e.b));
  const folded = [...items.keys()].some((id) => id.startsWith('module '));
  const rows = folded ? refold(items, edges, layout) : null;
  if (!rows) for (const item of items.values()) [item.x, item.y] = layout.places.get(item.id);
  for (const e of edges) e.via = folded ? around(items.get(e.a), items.get(e.b), rows) : layout.via.get(e.a + '\n' + e.b) || null;
  return { items, edges, own };
}

/* Layers of the graph with collapsed modules: longest paths; columns below what is read, in the order in which the members were, pushed apart. */
function refold(items, edges, layout) {
  const next = new Map(), waiting = new Map(), layer = new Map();
  for (const item of items.values()) {
    const places = item.members.map((m) => layout.places.get(m));
    item.x = places.reduce((sum, p) => sum + p[0], 0) / places.length;
    item.top = Math.min(...places.map((p) => p[1]));
    next.set(item.id, []);
    waiting.set(item.id, 0);
  }
  for (const e of edges) { next.get(e.a).push(e.b); waiting.set(e.b, waiting.get(e.b) + 1); }
  const left = new Set([...items.values()].sort((a, b) => a.top - b.top).map((i) => i.id));
  let ready = [...left].filter((id) => !waiting.get(id));
  while (left.size) {
    const id = ready.length ? ready.shift() : left.values().next().value;
    if (!left.delete(id)) continue;
    const depth = layer.get(id) || 0;
    layer.set(id, depth);
    for (const b of next.get(id)) {
      if (!left.has(b)) continue;
      layer.set(b, Math.max(layer.get(b) || 0, depth + 1));
      waiting.set(b, waiting.get(b) - 1);
      if (!waiting.get(b)) ready.push(b);
    }
  }
  const rows = new Map();
  for (const item of items.values()) { const d = layer.get(item.id); rows.set(d, [...(rows.get(d) || []), item]); }
  const above = new Map();
  for (const e of edges) above.set(e.b, [...(above.get(e.b) || []), items.get(e.a)]);
  for (const depth of [...rows.keys()].sort((a, b) => a - b)) {
    const row = rows.get(depth).sort((a, b) => a.x - b.x);
    for (const item of row) {
      const placed = (above.get(item.id) || []).filter((i) => layer.get(i.id) < depth);
      if (placed.length) item.x = placed.reduce((sum, i) => sum + i.x, 0) / placed.length;
    }
    const middle = row.reduce((sum, i) => sum + i.x, 0) / row.length;
    row.forEach((item, i) => { if (i) item.x = Math.max(item.x, row[i - 1].x + BOX.dx); });
    const shift = row.reduce((sum, i) => sum + i.x, 0) / row.length - middle;
    for (const item of row) { item.x -= shift; item.y = depth * BOX.dy; }
  }
  return rows;
}

/* Points of an edge over several layers: the straight line, pushed out of the boxes that it would cross */
function around(a, b, rows) {
  const first = a.y / BOX.dy, last = b.y / BOX.dy, points = [], clear = BOX.w / 2 + 14;
  for (let depth = first + 1; depth < last; depth++) {
    let x = a.x + ((b.x - a.x) * (depth - first)) / (last - first);
    for (const item of rows.get(depth) || []) if (Math.abs(item.x - x) < clear) x = item.x + (x < item.x || (x === item.x && a.x < item.x) ? -clear : clear);
    points.push([x, depth * BOX.dy - BOX.h / 2 - 4], [x, depth * BOX.dy + BOX.h / 2 + 4]);
  }
  return points.length ? points : null;
}

function edgePath(a, b, via) {
  const half = BOX.h / 2, points = [[a.x, a.y + half], ...(via || []), [b.x, b.y - half]];
  let path = `M${points[0][0].toFixed(1)} ${points[0][1].toFixed(1)}`;
  for (let i = 1; i < points.length; i++) {
    const [x0, y0] = points[i - 1], [x1, y1] = points[i], bend = (y1 - y0) / 2;
    path += x0 === x1 ? `L${x1.toFixed(1)} ${y1.toFixed(1)}` : `C${x0.toFixed(1)} ${(y0 + bend).toFixed(1)},${x1.toFixed(1)} ${(y1 - bend).toFixed(1)},${x1.toFixed(1)} ${y1.toFixed(1)}`;
  }
  return path;
}

const clip = (text, most) => (text.length <= most ? text : '…' + text.slice(text.length - most + 1));

/* The most frequent kinds of a module: 3 conv, 2 relu */
function contents(members) {
  const count = new Map();
  for (const m of members) { const kind = rowOf(m)[KIND]; count.set(kind, (count.get(kind) || 0) + 1); }
  return [...count].sort((a, b) => b[1] - a[1]).map(([kind, n]) => `${n} ${kind}`).join(', ');
}

const spoken = (item) => (item.row ? [`${item.row[KIND]} ${item.row[NAME]}`, ...Object.keys(item.marks)].join(', ') : `module ${item.group}, ${item.members.length} nodes, collapsed`);

/* What the nodes are labelled with: of a module the worst of its nodes, or their sum */
const LABELS = {
  none: ['nothing', () => null],
  sqnr: ['SQNR of this pass', (members) => worstOf(members, 0)],
  total: ['SQNR since the float graph', (members) => worstOf(members, 3)],
  macs: ['MACs', (members) => { const sum = section().layers.filter((l) => members.includes(l.node)).reduce((n, l) => n + l.macs, 0); return sum ? [short(sum), false] : null; }],
};
const LOW = 20;

function worstOf(members, which) {
  const found = members.map((m) => numbers(S.pass, m)).filter((v) => v && v[which] !== null).map((v) => v[which]).sort((a, b) => asNumber(a) - asNumber(b))[0];
  return found === undefined ? null : [db(found) + (found === 'inf' ? '' : ' dB'), asNumber(found) < LOW];
}

function drawItem(item) {
  const one = item.row, kinds = ['added', 'removed', 'changed'].filter((k) => item.marks[k]);
  const mark = one ? kinds[0] || '' : kinds.length ? 'changed' : '';
  const runs = one ? one[RUNS] : '';
  const head = one ? one[KIND] : clip(item.group, 17) + ' ▸', side = one ? one[SIZES].replace(/[[\]]/g, '').replace(/,/g, '×') : item.members.length + ' nodes';
  const foot = one ? one[PATH] || one[NAME] : contents(item.members);
  const value = LABELS[S.label][1](item.members);
  const g = h('g', { class: `node ${one ? 'op' : 'module'} ${mark} ${runs}`, transform: `translate(${(item.x - BOX.w / 2).toFixed(1)} ${(item.y - BOX.h / 2).toFixed(1)})`, 'data-id': item.id },
    h('title', {}, spoken(item) + (one ? '\n' + one[TEXT] : '')),
    h('rect', { class: 'box', width: BOX.w, height: BOX.h, rx: 5 }),
    h('rect', { class: 'band', x: 0, y: 5, width: 3, height: BOX.h - 10 }),
    h('text', { class: 'kind', x: 11, y: 16 }, one ? clip(head, 15) : head),
    h('text', { class: 'side', x: BOX.w - 8, y: 16, 'text-anchor': 'end' }, clip(side, 16)),
    h('text', { class: 'path', x: 11, y: 31 }, one ? clip(foot, (mark ? 26 : 29) - (value ? value[0].length + 1 : 0)) : foot.length > 26 - (value ? value[0].length : 0) ? foot.slice(0, 25 - (value ? value[0].length : 0)) + '…' : foot),
    value && h('text', { class: 'value' + (value[1] ? ' low' : ''), x: BOX.w - (mark ? 21 : 8), y: 31, 'text-anchor': 'end' }, value[0]),
    mark && h('text', { class: 'sign', x: BOX.w - 9, y: 32, 'text-anchor': 'end' }, one ? { added: '+', removed: '−', changed: '~' }[mark] : '~'));
  item.element = g;
  return g;
}

function drawGraph(keep) {
  const box = $('graph');
  if (!box) return;
  const s = section();
  if (s.passes[S.pass].layout === null) { fill(box, h('p', { class: 'pad muted' }, 'This graph is too large to be drawn. The diff and the tables hold all of it.')); G.svg = null; return; }
  const { items, edges, own } = scene();
  Object.assign(G, { items, edges, own, view: h('g', {}) });
  for (const e of edges) {
    const xs = [items.get(e.a), items.get(e.b)].map((i) => i.x).concat((e.via || []).map((p) => p[0]));
    e.box = [Math.min(...xs), items.get(e.a).y, Math.max(...xs), items.get(e.b).y];
  }
  G.lines = h('g', {});
  G.boxes = h('g', {});
  G.view.append(G.lines, G.boxes);
  G.svg = h('svg', { width: '100%', height: '100%', 'aria-hidden': 'true' }, G.view);
  fill(box, G.svg);
  if (keep) place(); else home();
  cull();
}

/* Of a large graph only what is near the view is in the page. */
const ALL = 300;

function cull() {
  G.waiting = false;
  if (!G.svg || !G.svg.isConnected) return;
  const [w, hgt] = size(), some = G.items.size > ALL, left = (-G.x - w / 2) / G.scale, top = (-G.y - hgt / 2) / G.scale, right = (1.5 * w - G.x) / G.scale, low = (1.5 * hgt - G.y) / G.scale;
  const near = (x0, y0, x1, y1) => !some || (x1 > left && x0 < right && Math.max(y0, y1) > top && Math.min(y0, y1) < low);
  const show = (thing, into, seen, make) => {
    if (seen && !thing.element) thing.element = make();
    if (!thing.element) return;
    if (!seen) thing.element.remove(); else { dress(thing); if (!thing.element.isConnected) into.append(thing.element); }
  };
  G.chosen = S.node && reveal(S.node);
  for (const e of G.edges) show(e, G.lines, near(...e.box), () => drawEdge(e));
  for (const i of G.items.values()) show(i, G.boxes, near(i.x - BOX.w / 2, i.y - BOX.h / 2, i.x + BOX.w / 2, i.y + BOX.h / 2), () => drawItem(i));
  G.svg.classList.toggle('far', G.scale < 0.2);
}

function drawEdge(e) {
  const kind = S.state !== 'changes' || e.which === 'both' || S.pass === 0 ? '' : e.which === 'after' ? 'added' : 'removed';
  return h('path', { class: 'edge ' + kind, d: edgePath(G.items.get(e.a), G.items.get(e.b), e.via) });
}

/* Pan and zoom */

function place() {
  if (!G.view) return;
  G.view.setAttribute('transform', `translate(${G.x} ${G.y}) scale(${G.scale})`);
  if (G.items.size > ALL && !G.waiting) { G.waiting = true; requestAnimationFrame(cull); }
}

function bounds() {
  let [x0, y0, x1, y1] = [Infinity, Infinity, -Infinity, -Infinity];
  for (const i of G.items.values()) { x0 = Math.min(x0, i.x); x1 = Math.max(x1, i.x); y0 = Math.min(y0, i.y); y1 = Math.max(y1, i.y); }
  return [x0 - BOX.w / 2, y0 - BOX.h / 2, x1 + BOX.w / 2, y1 + BOX.h / 2];
}
const size = () => { const r = $('graph').getBoundingClientRect(); return [r.width || 600, r.height || 400]; };

function fit() {
  if (!G.items.size) return;
  const [x0, y0, x1, y1] = bounds(), [w, hgt] = size();
  G.scale = Math.min(1.4, (w - 24) / (x1 - x0), (hgt - 24) / (y1 - y0));
  G.x = (w - G.scale * (x0 + x1)) / 2;
  G.y = (hgt - G.scale * (y0 + y1)) / 2;
  place();
}

/* A readable size, from the first change on */
function home() {
  if (!G.items.size) return;
  const [x0, y0, x1, y1] = bounds(), [w, hgt] = size();
  if ((y1 - y0) * 0.75 < hgt && (x1 - x0) * 0.75 < w) { fit(); return; }
  const first = G.items.get(S.node) || [...G.items.values()].filter((i) => Object.keys(i.marks).length).sort((a, b) => a.y - b.y)[0];
  G.scale = Math.max(w < 500 ? 0.75 : 0.8, Math.min(1, (w - 24) / (x1 - x0)));
  G.x = w / 2 - G.scale * (first && x1 - x0 > w / G.scale ? first.x : (x0 + x1) / 2);
  G.y = 16 - G.scale * (first ? Math.max(y0, first.y - BOX.dy * 1.5) : y0);
  place();
}

function zoom(factor, x, y) {
  const [w, hgt] = size(), cx = x === undefined ? w / 2 : x, cy = y === undefined ? hgt / 2 : y;
  const next = Math.min(3, Math.max(0.02, G.scale * factor));
  G.x = cx - (cx - G.x) * (next / G.scale);
  G.y = cy - (cy - G.y) * (next / G.scale);
  G.scale = next;
  place();
}

function centre(item) {
  const [w, hgt] = size();
  if (G.scale < 0.5) G.scale = 0.8;
  G.x = w / 2 - G.scale * item.x;
  G.y = hgt / 2 - G.scale * item.y;
  place();
}

function reveal(name) {
  const at = G.items.get(name);
  if (at) return at;
  for (const item of G.items.values()) if (item.members.includes(name)) return item;
  return null;
}

/* The chosen node, its neighbours, what the search finds */
const highlight = () => cull();

function dress(thing) {
  const list = thing.element.classList, query = S.query.toLowerCase();
  if (!thing.members) { list.toggle('near', Boolean(G.chosen) && (thing.a === G.chosen.id || thing.b === G.chosen.id)); return; }
  const hit = query && thing.members.some((m) => matches(rowOf(m), query));
  list.toggle('chosen', thing === G.chosen);
  list.toggle('hit', Boolean(hit));
  list.toggle('dim', Boolean(query) && !hit);
}
const matches = (row, query) => row && (row[NAME].toLowerCase().includes(query) || row[KIND].toLowerCase().includes(query) || row[PATH].toLowerCase().includes(query));

function fold(group, closed) {
  if (closed) S.collapsed.add(group); else for (const g of [...S.collapsed]) if (g === group || g.startsWith(group + '.')) S.collapsed.delete(g);
  const on = G.scale, x = G.x, y = G.y;
  drawGraph();
  Object.assign(G, { scale: on, x, y });
  place();
  const item = G.items.get('module ' + group) || (S.node && reveal(S.node)) || [...G.items.values()].find((i) => i.row && ancestors(G.own.get(i.id)).includes(group));
  if (item) centre(item);
  announce(`${group} ${closed ? 'collapsed' : 'expanded'}`);
}

const allGroups = () => new Set([...groupsOf(S.pass, section().layouts[section().passes[S.pass].layout].names).values()].flatMap(ancestors));

function foldDepth(depth) {
  S.collapsed = new Set([...allGroups()].filter((g) => g.split('.').length === depth));
  drawGraph();
}

/* Modules without a change are collapsed, the outermost ones */
function foldUnchanged() {
  const mark = marks(S.pass), own = groupsOf(S.pass, section().layouts[section().passes[S.pass].layout].names), busy = new Set();
  for (const [name, group] of own) if (mark.has(name)) for (const g of ancestors(group)) busy.add(g);
  S.collapsed = new Set([...allGroups()].filter((g) => !busy.has(g)));
  drawGraph();
}

/* Along the edges: up to an input, down to a reader, sideways in the layer */
function walk(key) {
  const here = S.node && reveal(S.node);
  if (!here) { const first = [...G.items.values()].sort((a, b) => a.y - b.y)[0]; if (first) chooseItem(first); return; }
  const near = (list) => list.sort((a, b) => Math.abs(a.x - here.x) - Math.abs(b.x - here.x) || Math.abs(a.y - here.y) - Math.abs(b.y - here.y))[0];
  let to = null;
  if (key === 'ArrowUp') to = near(G.edges.filter((e) => e.b === here.id).map((e) => G.items.get(e.a)));
  if (key === 'ArrowDown') to = near(G.edges.filter((e) => e.a === here.id).map((e) => G.items.get(e.b)));
  if (key === 'ArrowLeft' || key === 'ArrowRight') {
    const sign = key === 'ArrowLeft' ? -1 : 1;
    to = near([...G.items.values()].filter((i) => i.y === here.y && sign * (i.x - here.x) > 0));
  }
  if (to) chooseItem(to);
}

function chooseItem(item) {
  select(item.row ? item.row[NAME] : item.members[0], { centre: true });
  announce(spoken(item));
}
