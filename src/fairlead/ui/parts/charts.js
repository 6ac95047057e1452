// @ts-check
import { html, useEffect, useMemo, useRef, useState } from "../lib/html.js";
import { clock, short } from "../lib/format.js";

/**
 * @typedef {object} Line
 * @property {string} label
 * @property {(number | null)[]} values
 * @property {1 | 2 | 3 | 4 | 5 | 6} colour  Which of the palette's.
 * @property {boolean} [area]
 */

/** Of the time that is shown, so that the first numbers do not fly past. */
const LEAST_SECONDS = 900;

/** @type {Promise<any> | null} */
let library = null;
/** Read when the first chart is drawn, so that no page waits for it. */
const uPlot = () => (library ??= import("uplot").then((module) => module.default));

/**
 * Lines over time. Its height is kept before there is anything to draw.
 * @param {{at: number[], lines: Line[], label: string, show?: (value: number | null) => string, height?: number, max?: number, none?: string}} props
 *   `at`: seconds since 1970. `show`: a value with its unit. `max`: of the scale at least. `none`: said where there is nothing.
 */
export function Chart({ at, lines, label, show = short, height = 180, max, none = "No traffic in the last hour" }) {
  const box = useRef(/** @type {any} */ (null));
  const plot = useRef(/** @type {any} */ (null));
  const [theme, setTheme] = useState(0);
  const [index, setIndex] = useState(/** @type {number | null} */ (null));
  const shape = lines.map((each) => `${each.label}${each.colour}${each.area}`).join();
  const data = useMemo(() => [at, ...lines.map((each) => each.values)], [at, ...lines.map((each) => each.values)]);
  const latest = useRef(data);
  latest.current = data;

  useEffect(() => {
    const changed = () => setTheme((old) => old + 1);
    addEventListener("fairlead-theme", changed);
    return () => removeEventListener("fairlead-theme", changed);
  }, []);
  useEffect(() => {
    let gone = false;
    /** @type {ResizeObserver | undefined} */
    let sizes;
    uPlot().then((Plot) => {
      if (gone || !box.current) return;
      const style = getComputedStyle(document.documentElement);
      const colour = (/** @type {string} */ name) => style.getPropertyValue(name).trim();
      const font = `11px ${colour("--font")}`;
      const axis = { stroke: colour("--faint"), font, grid: { stroke: colour("--grid"), width: 1 }, ticks: { show: false } };
      plot.current = new Plot(
        {
          width: box.current.clientWidth,
          height,
          padding: [8, 4, 0, 0],
          legend: { show: false },
          cursor: { y: false, points: { size: 7 }, sync: { key: "time" }, drag: { x: false, y: false } },
          scales: { x: { range: (/** @type {any} */ _, /** @type {number} */ from, /** @type {number} */ to) => [Math.min(from, to - LEAST_SECONDS), to] }, y: { range: (/** @type {any} */ _, /** @type {number} */ __, /** @type {number} */ top) => [0, Math.max((top ?? 0) * 1.1, max ?? 0) || 1] } },
          axes: [
            { ...axis, size: 28, space: 70, values: (/** @type {any} */ _, /** @type {number[]} */ splits) => splits.map((each) => clock(each).slice(0, 5)) },
            { ...axis, size: 58, space: 34, values: (/** @type {any} */ _, /** @type {number[]} */ splits) => splits.map((each) => show(each)) },
          ],
          series: [
            {},
            ...lines.map((each) => ({
              stroke: colour(`--c${each.colour}`),
              width: 1.5,
              fill: each.area ? `color-mix(in srgb, ${colour(`--c${each.colour}`)} 14%, transparent)` : undefined,
              points: { show: false },
              spanGaps: false,
            })),
          ],
          hooks: { setCursor: [(/** @type {any} */ self) => setIndex(self.cursor.idx ?? null)] },
        },
        latest.current,
        box.current,
      );
      sizes = new ResizeObserver(() => box.current && plot.current?.setSize({ width: box.current.clientWidth, height }));
      sizes.observe(box.current);
    });
    return () => {
      gone = true;
      sizes?.disconnect();
      plot.current?.destroy();
      plot.current = null;
    };
  }, [theme, shape, height, max]);
  useEffect(() => plot.current?.setData(data), [data]);

  const shown = index !== null && index < at.length ? index : at.length - 1;
  const nothing = !at.length || lines.every((each) => each.values.every((value) => value === null));
  const said = lines.map((each) => `${each.label} ${show(each.values.at(-1) ?? null)}`).join(", ");
  return html`
    <figure class="chart" role="img" aria-label=${`${label}: ${nothing ? none : said}`}>
      <div class="plot" ref=${box} style=${{ height: `${height}px` }}></div>
      ${nothing && html`<div class="none">${none}</div>`}
      <ul class="legend" aria-hidden="true">
        ${lines.map((each) => html`<li key=${each.label}><i class=${`c${each.colour}`}></i>${each.label}<b>${show(each.values[shown] ?? null)}</b></li>`)}
      </ul>
      <span class="at" aria-hidden="true">${index !== null && at.length ? clock(at[shown]) : ""}</span>
    </figure>
  `;
}

/** A line without axes, for a row of a table. @param {{values: (number | null)[], label: string, width?: number, height?: number}} props */
export function Sparkline({ values, label, width = 96, height = 22 }) {
  const known = values.map((each) => each ?? 0);
  const top = Math.max(...known, 0) || 1;
  const step = width / Math.max(known.length - 1, 1);
  const points = known.map((value, i) => `${(i * step).toFixed(1)} ${(height - 2 - (value / top) * (height - 4)).toFixed(1)}`);
  return html`
    <svg class="spark" width=${width} height=${height} viewBox=${`0 0 ${width} ${height}`} role="img" aria-label=${label}>
      ${points.length > 1 && html`<path class="area" d=${`M0 ${height}L${points.join("L")}L${width} ${height}Z`} /><path class="line" d=${`M${points.join("L")}`} />`}
    </svg>
  `;
}
