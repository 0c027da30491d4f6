/* Helpers, and the data as it is read: states, marks, groups. Every text goes into the page as a text node. */

const SVG = 'http://www.w3.org/2000/svg';
const S = { section: 0, pass: 0, state: 'changes', view: 'graph', tab: 'passes', node: null, query: '', label: 'none', collapsed: new Set(), split: false };
let D = null;

function h(tag, attributes, ...children) {
  const element = /^(svg|g|rect|path|text|line|title|circle|polyline)$/.test(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith('aria-') && value !== null && value !== undefined) element.setAttribute(key, String(value));
    else if (key.startsWith('on')) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, '');
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, String(value));
  }
  for (const child of children.flat(3)) if (child !== null && child !== undefined && child !== false) element.append(child);
  return element;
}

const fill = (element, ...children) => { element.replaceChildren(...children.flat(3).filter((c) => c !== null && c !== undefined && c !== false)); return element; };
const $ = (id) => document.getElementById(id);

async function decode(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  return JSON.parse(await new Response(stream).text());
}

/* Numbers */

function short(value) {
  for (const [size, unit] of [[1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [1e3, 'k']]) {
    if (value >= size) { const v = value / size; return v.toFixed(v < 10 ? 2 : v < 100 ? 1 : 0) + ' ' + unit; }
  }
  return String(value);
}
const byteText = (n) => (n >= 1e3 ? short(n) + 'B' : n + ' B');
const percent = (part, whole) => { const p = whole ? (100 * part) / whole : 0; return p === 0 || p === 100 ? p + ' %' : p < 0.01 ? '< 0.01 %' : (p < 10 ? p.toFixed(2) : p.toFixed(1)) + ' %'; };
function num(value, digits = 4) {
  if (value === null || value === undefined) return '';
  if (typeof value === 'string') return value === 'inf' ? '∞' : value === '-inf' ? '−∞' : value;
  return String(Number(value.toPrecision(digits)));
}
const db = (value) => (value === null || value === undefined ? '' : value === 'inf' ? 'exact' : typeof value === 'string' ? num(value) : value.toFixed(1));
const asNumber = (value) => (value === 'inf' ? Infinity : value === '-inf' ? -Infinity : typeof value === 'number' ? value : NaN);

/* States: a row is [name, kind, path, inputs, sizes, grid, codes, runs, why, detail, text] */

const NAME = 0, KIND = 1, PATH = 2, INPUTS = 3, SIZES = 4, GRID = 5, CODES = 6, RUNS = 7, WHY = 8, DETAIL = 9, TEXT = 10;

function prepare(section) {
  let list = [];
  section.states = section.passes.map((pass) => {
    const next = [];
    let at = 0;
    for (const [start, gone, come] of pass.edits) { next.push(...list.slice(at, start), ...come); at = start + gone; }
    list = next.concat(list.slice(at));
    return list;
  });
  section.maps = section.states.map(() => null);
  section.marked = section.passes.map(() => null);
  section.final = section.passes.length - 1;
}

const section = () => D.sections[S.section];

function nodes(at, s = section()) {
  if (at < 0) return new Map();
  if (!s.maps[at]) s.maps[at] = new Map(s.states[at].map((id) => [s.rows[id][NAME], s.rows[id]]));
  return s.maps[at];
}

/* node -> added, removed or changed; of the first state nothing is marked */
function marks(at, s = section()) {
  if (!s.marked[at]) {
    const found = new Map(), before = nodes(at - 1, s), after = nodes(at, s);
    if (at > 0) {
      for (const [name, row] of after) { const old = before.get(name); if (!old) found.set(name, 'added'); else if (old !== row) found.set(name, 'changed'); }
      for (const name of before.keys()) if (!after.has(name)) found.set(name, 'removed');
    }
    s.marked[at] = found;
  }
  return s.marked[at];
}

function rowOf(name, at = S.pass) {
  for (const i of [at, at - 1, section().final]) { const row = nodes(i).get(name); if (row) return row; }
  for (let i = 0; i <= section().final; i++) { const row = nodes(i).get(name); if (row) return row; }
  return null;
}

function numbers(at, name, s = section()) {
  const pass = s.passes[at];
  if (!pass.byName) {
    pass.byName = new Map(Object.entries(pass.numbers).map(([place, values]) => [s.rows[s.states[at][place]][NAME], values]));
  }
  return pass.byName.get(name) || null;
}
const reordered = (values) => values && values[4] ? h('span', { class: 'muted', title: 'the numbers hold for the channels put back' }, ' channels reordered') : null;
const measured = (s = section()) => s.passes.some((p) => Object.keys(p.numbers).length);

function users(name, at) {
  const found = [];
  for (const row of nodes(at).values()) if (row[INPUTS].includes(name)) found.push(row[NAME]);
  return found;
}

/* The value that a node's quantizer rounds is the node's own: its histogram is found under either name. */
function histogram(name) {
  const s = section();
  if (s.activations[name]) return [name, s.activations[name]];
  const reader = users(name, s.final).find((u) => nodes(s.final).get(u)[KIND] === 'fake_quantize' && s.activations[u]);
  return reader ? [reader, s.activations[reader]] : null;
}

/* Groups: the proper prefixes of module paths. What has no path lies where its deepest input lies, a constant where it is read. */
function groupsOf(at, names) {
  const own = new Map(), rows = (n) => nodes(at).get(n) || nodes(at - 1).get(n);
  for (const name of names) {
    const row = rows(name);
    if (row[PATH]) own.set(name, row[PATH].split('.').slice(0, -1).join('.'));
  }
  for (const name of names) {
    for (const input of rows(name)[INPUTS]) if (own.has(name) && (rows(input) || [])[KIND] === 'attr' && !own.get(input)) own.set(input, own.get(name));
  }
  for (const name of names) {
    if (own.has(name)) continue;
    const row = rows(name);
    const inputs = row[KIND] === 'output' ? [] : row[INPUTS].map((i) => own.get(i) || '');
    own.set(name, inputs.sort((a, b) => b.length - a.length)[0] || '');
  }
  return own;
}
const ancestors = (group) => (group ? group.split('.').map((_, i, parts) => parts.slice(0, i + 1).join('.')) : []);

/* Choosing */

const listeners = [];
const onSelect = (f) => listeners.push(f);

function select(name, options = {}) {
  S.node = name;
  for (const f of listeners) f(name, options);
}

function announce(text) { $('live').textContent = text; }

function nodeLink(name, options, label) {
  return h('button', { class: 'link mono', type: 'button', onclick: () => select(name, { centre: true, show: true, ...options }) }, label || name);
}
