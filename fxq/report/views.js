/* What the stage shows of a pass besides the graph: the text diff, the numbers, what was left alone. */

/* Lines of one node beside each other: the longest run of common names in order; the rest stands alone. */
function paired(old, fresh, name) {
  const at = new Map(fresh.map((id, j) => [name(id), j])), tails = [];
  old.forEach((id, i) => {
    const j = at.get(name(id));
    if (j === undefined) return;
    let n = tails.length;
    while (n > 0 && tails[n - 1].j >= j) n--;
    tails[n] = { i, j, before: n ? tails[n - 1] : null };
  });
  const pairs = [];
  for (let p = tails[tails.length - 1]; p; p = p.before) pairs.unshift(p);
  const lines = [];
  let [a, b] = [0, 0];
  for (const { i, j } of [...pairs, { i: old.length, j: fresh.length }]) {
    while (a < i) lines.push([old[a++], undefined]);
    while (b < j) lines.push([undefined, fresh[b++]]);
    if (i < old.length) lines.push([old[a++], fresh[b++]]);
  }
  return lines;
}

/* A line with what it does not share with the other one marked: all but the common front and end, in whole words */
function changed(text, other) {
  if (other === undefined || other === text) return text;
  const a = text.split(/(?<=[\s,(){}<>@])|(?=[\s,(){}<>@])/), b = other.split(/(?<=[\s,(){}<>@])|(?=[\s,(){}<>@])/);
  let front = 0, end = 0;
  while (front < a.length && front < b.length && a[front] === b[front]) front++;
  while (end < a.length - front && end < b.length - front && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const middle = a.slice(front, a.length - end).join('');
  return [a.slice(0, front).join(''), middle && h('mark', {}, middle), a.slice(a.length - end).join('')];
}

/* The text diff, from the edits that the states are stored as */
function diffView() {
  const s = section(), pass = s.passes[S.pass], before = S.pass ? s.states[S.pass - 1] : [], text = (id) => s.rows[id][TEXT];
  const switcher = chooser('How the diff is shown', 'radiogroup', [['unified', 'Unified'], ['split', 'Side by side']], S.split ? 'split' : 'unified', (v) => { S.split = v === 'split'; stage(); }, { class: 'segments' });
  const lines = [], around = 3;
  const put = (sign, old, fresh) => lines.push([sign, old, fresh]);
  let at = 0;
  const equal = (to, first, last) => {
    const run = before.slice(at, to), head = first ? 0 : around, tail = last ? 0 : around;
    run.forEach((id, i) => { if (i < head || i >= run.length - tail) put('=', text(id), text(id)); else if (i === head) put('…', `${run.length - head - tail} equal lines`, run.slice(head, run.length - tail)); });
    at = to;
  };
  pass.edits.forEach(([start, gone, come], n) => {
    equal(start, n === 0, false);
    for (const [a, b] of paired(before.slice(start, start + gone), come, (id) => s.rows[id][NAME])) {
      const [old, fresh] = [a, b].map((id) => (id === undefined ? undefined : text(id)));
      if (S.split) put('≠', old, fresh); else { if (old !== undefined) put('-', old, fresh); if (fresh !== undefined) put('+', fresh, old); }
    }
    at = start + gone;
  });
  equal(before.length, !pass.edits.length, true);
  if (!pass.edits.length) return [h('p', { class: 'note' }, 'This pass changed nothing.')];
  const cell = (t, other, kind) => h('td', { class: 'code ' + (t === undefined ? 'none' : kind) }, t === undefined ? '' : changed(t, other));
  const draw = ([sign, old, fresh]) => {
    if (sign === '…') {
      const row = h('tr', { class: 'gap' }, h('td', { colspan: 2 }, h('button', { class: 'link', type: 'button', onclick: () => row.replaceWith(...fresh.map((id) => draw(['=', text(id), text(id)]))) }, old)));
      return row;
    }
    if (S.split) return h('tr', {}, cell(old, fresh, sign === '=' ? '' : 'removed'), cell(fresh, old, sign === '=' ? '' : 'added'));
    const kind = { '-': 'removed', '+': 'added', '=': '' }[sign];
    return h('tr', { class: kind }, h('td', { class: 'sign', 'aria-label': kind }, sign === '=' ? '' : sign), h('td', { class: 'code' }, changed(old, fresh)));
  };
  return [h('div', { class: 'tools' }, S.pass > 0 && switcher), h('div', { class: 'wide diff' + (S.split ? ' split' : ''), tabindex: 0, role: 'region', 'aria-label': 'Text diff' }, h('table', { id: 'diff' }, h('tbody', {}, lines.map(draw))))];
}

function numbersView() {
  const s = section(), pass = s.passes[S.pass], rows = Object.entries(pass.numbers).map(([place, v]) => ({ node: s.rows[s.states[S.pass][place]], v }));
  if (!rows.length) return [h('p', { class: 'note' }, measured() ? 'No value of this state was compared.' : 'Numbers after each pass are recorded by compile(..., numbers=True); this model was compiled without.'), pass.moved !== null && h('p', {}, `The output moved by ${num(pass.moved)} of its greatest magnitude.`)];
  const moved = rows.filter((r) => r.v[0] !== 'inf');
  return [h('p', { class: 'lead' }, `${moved.length} of ${rows.length} surviving values moved on the probe.`),
    table([
      { title: 'node', value: (r) => r.node[NAME], show: (r) => [nodeLink(r.node[NAME], { stay: true }), reordered(r.v)] }, { title: 'kind', value: (r) => r.node[KIND] },
      { title: 'SQNR dB', help: 'against the state before the pass', value: (r) => asNumber(r.v[0]), right: true, rising: true, show: (r) => db(r.v[0]) }, { title: 'cosine', value: (r) => asNumber(r.v[1]), right: true, rising: true, show: (r) => num(r.v[1], 6) },
      { title: 'steps', help: 'greatest move in steps of its grid', value: (r) => (r.v[2] === null ? -1 : asNumber(r.v[2])), right: true, show: (r) => num(r.v[2], 3) },
      { title: 'total dB', help: 'against the captured float graph', value: (r) => asNumber(r.v[3]), right: true, rising: true, show: (r) => db(r.v[3]) },
    ], rows, { id: 'numbers', order: [2, 1] })];
}

function skipsView() {
  const skips = section().passes[S.pass].skips;
  if (!skips.length) return h('p', { class: 'note' }, 'This pass left no place alone.');
  return table([{ title: 'node', value: (k) => k[0], show: (k) => (rowOf(k[0]) ? nodeLink(k[0], { stay: true }) : k[0]) }, { title: 'reason', value: (k) => k[1], className: 'reason' }], skips, { id: 'skips' });
}
