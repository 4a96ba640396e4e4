// The last hour as small charts: stacked areas for what adds up, lines for what does not.

import { attr, colourOf, el, keyed, missing, svg, t, text } from './parts.js';

const [W, H] = [360, 120];      // of the drawing, which is stretched to its place
const SPAN_S = 3600;
const STEPS = 120;              // points across
const MODELS = 6;               // with a colour of their own; the others are one

// {name, stacked, format} -> an element with update(history)
export function chart({ name, column, stacked, format, edge }) {
  const plot = svg('svg', { viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: 'none', 'aria-hidden': 'true', class: 'plot' });
  const grid = svg('g', { class: 'grid' });
  const shapes = svg('g', {});
  const cursor = svg('line', { class: 'cursor', y1: 0, y2: H, hidden: '' });
  plot.append(grid, shapes, cursor);
  const value = el('p', { class: 'value' });
  const title = el('h3', {});
  const tip = el('div', { class: 'tip', hidden: true });
  const top = el('span', { class: 'edge top-edge' });
  const frame = el('div', { class: 'frame', role: 'img', tabindex: '0' }, plot, top, tip);
  const axis = el('div', { class: 'axis', 'aria-hidden': 'true' }, ...[60, 45, 30, 15].map(n => el('span', { 'data-minutes': n })), el('span', {}));
  const legend = el('ul', { class: 'legend' });
  const said = el('p', { class: 'unseen', 'aria-live': 'polite' });
  const card = el('section', { class: 'card chart' }, el('div', { class: 'head' }, title, el('span', { class: 'faint' })), value, frame, axis, legend, said);
  let points = null;
  let at = null;

  function show(step, speak) {
    at = step;
    attr(cursor, 'hidden', step === null ? '' : null);
    tip.hidden = step === null || !points;
    if (tip.hidden) return;
    const x = (step + 0.5) / STEPS;
    attr(cursor, 'x1', x * W);
    attr(cursor, 'x2', x * W);
    const minutes = Math.round((STEPS - 1 - step) * SPAN_S / STEPS / 60);
    const rows = points.series.map(one => ({ ...one, v: one.values[step] })).filter(one => !missing(one.v) && (one.v > 0 || points.series.length === 1));
    const head = `${minutes === 0 ? t('now') : t('minutes_ago', { n: minutes })}   ${format(points.total[step])}`;
    tip.replaceChildren(el('strong', {}, head),
      ...rows.slice(0, MODELS + 1).map(one => el('span', { class: 'entry' }, el('i', { class: `swatch c${one.colour}` }), one.label, el('b', {}, format(one.v)))));
    tip.classList.toggle('left', x > 0.55);
    tip.style.setProperty('--x', `${x * 100}%`);
    if (speak) text(said, head);
  }

  frame.addEventListener('pointermove', event => {
    const box = frame.getBoundingClientRect();
    show(Math.max(0, Math.min(STEPS - 1, Math.floor((event.clientX - box.left) / box.width * STEPS))));
  });
  frame.addEventListener('pointerleave', () => show(null));
  frame.addEventListener('blur', () => show(null));
  frame.addEventListener('keydown', event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    show(Math.max(0, Math.min(STEPS - 1, (at ?? STEPS) + by)), true);
  });

  card.update = history => {
    points = gather(history, column, stacked);
    const label = t(name);
    const now = points.now;
    const most = Math.max(0, ...(stacked ? points.total : points.series.flatMap(one => one.values)).filter(one => !missing(one)));
    text(title, label);
    text(card.querySelector('.faint'), t('last_hour'));
    text(value, format(now));
    attr(frame, 'aria-label', t('chart_label', { name: label, now: format(now), peak: format(most) }));
    for (const one of axis.querySelectorAll('[data-minutes]')) text(one, t('minutes_ago', { n: one.dataset.minutes }));
    text(axis.lastElementChild, t('now'));
    const ceiling = nice(most);
    text(top, most > 0 ? edge(ceiling) : t('nothing_yet'));
    grid.replaceChildren(...[0, 0.5, 1].map(share => svg('line', { x1: 0, x2: W, y1: H - share * H, y2: H - share * H })));
    shapes.replaceChildren(...(stacked ? areas(points, ceiling) : lines(points, ceiling)));
    keyed(legend, points.series.length > 1 ? points.series : [], one => one.label,
      one => el('li', {}, el('i', { class: 'swatch' }), el('span', {})),
      (item, one) => { item.firstChild.className = `swatch c${one.colour}`; text(item.lastChild, one.label); });
    if (at !== null) show(at);
  };
  return card;
}

// Steps of half a minute: the mean of what is known of each; null where nothing is.
function gather(history, column, stacked) {
  const end = history.at.at(-1) ?? 0;
  const step = SPAN_S / STEPS;
  const place = history.at.map(at => STEPS - 1 - Math.floor((end - at) / step));
  const fold = values => {
    const sums = Array(STEPS).fill(0);
    const counts = Array(STEPS).fill(0);
    (values ?? []).forEach((value, n) => { if (!missing(value) && place[n] >= 0) { sums[place[n]] += value; counts[place[n]] += 1; } });
    return sums.map((sum, n) => counts[n] ? sum / counts[n] : null);
  };
  const weight = values => values.reduce((sum, value) => sum + (value ?? 0), 0);
  const all = Object.entries(history.models).map(([label, columns]) => ({ label, values: fold(columns[column]) }))
    .filter(one => one.values.some(value => value > 0)).sort((a, b) => weight(b.values) - weight(a.values));
  const series = all.slice(0, MODELS).map(one => ({ ...one, colour: colourOf(one.label) }));
  if (stacked && all.length > MODELS) {
    const rest = all.slice(MODELS).map(one => one.values);
    series.push({ label: t('other_models'), colour: 'x', values: rest[0].map((_, n) => weight(rest.map(values => values[n]))) });
  }
  return { series, total: fold(history.total[column]), now: stacked ? history.total[column]?.at(-1) : history.total[column]?.findLast(value => !missing(value)) };
}

function nice(most) {
  if (!(most > 0)) return 1;
  const unit = 10 ** Math.floor(Math.log10(most));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map(n => n * unit).find(n => n >= most * 1.02) ?? 10 * unit;
}

const x = n => ((n + 0.5) / STEPS * W).toFixed(1);
const y = (value, ceiling) => (H - value / ceiling * H).toFixed(1);

function areas({ series, total }, ceiling) {
  const base = Array(STEPS).fill(0);
  const first = total.findIndex(value => !missing(value));
  if (first < 0) return [];
  return series.map(one => {
    const upper = [];
    const lower = [];
    for (let n = first; n < STEPS; n += 1) {
      lower.unshift(`${x(n)},${y(base[n], ceiling)}`);
      base[n] += one.values[n] ?? 0;
      upper.push(`${x(n)},${y(base[n], ceiling)}`);
    }
    return svg('g', { class: `c${one.colour}` }, svg('polygon', { class: 'area', points: [...upper, ...lower].join(' ') }),
      svg('polyline', { class: 'line', points: upper.join(' ') }));
  });
}

// A gap where nothing is known, bridged when it is short; a lone point is a dot.
function lines({ series }, ceiling) {
  return series.map(one => {
    const parts = [[]];
    one.values.forEach((value, n) => {
      if (missing(value)) { if (parts.at(-1).length && n - parts.at(-1).at(-1)[0] > 6) parts.push([]); return; }
      parts.at(-1).push([n, value]);
    });
    return svg('g', { class: `c${one.colour}` }, ...parts.filter(part => part.length).map(part => {
      const drawn = part.length > 1 ? part : [part[0], [part[0][0] + 0.6, part[0][1]]];
      return svg('polyline', { class: 'line', points: drawn.map(([n, value]) => `${x(n)},${y(value, ceiling)}`).join(' ') });
    }));
  });
}
