// @ts-check
import { html, useEffect, useLayoutEffect, useMemo, useRef, useState } from "../lib/html.js";
import { NONE } from "../lib/format.js";
import { Icon } from "./icons.js";
import { Empty, Failure } from "./layout.js";

/**
 * @template T
 * @typedef {object} Column
 * @property {string} id
 * @property {string} label
 * @property {(row: T) => any} show
 * @property {(row: T) => string | number | null | undefined} [by]  What it is sorted by; none: it cannot be. With `onSort` any value will do.
 * @property {boolean} [num]  A number: on the right.
 * @property {string} [width]  CSS.
 * @property {string} [class]
 */

const OVERSCAN = 8;

/**
 * Rows, sorted by a click on a heading. Of more than fit, only those in sight are drawn, so ten thousand are no more work than fifty.
 * Either `rows`, or for lists that are read in pieces `total`, `rowAt` and `load` (see `usePages`).
 * @param {{
 *   columns: Column<any>[], rows?: any[] | null, label: string, rowKey?: (row: any, index: number) => any, height?: number, rowHeight?: number,
 *   sort?: string, descending?: boolean, onSort?: (id: string, descending: boolean) => void, chosen?: (row: any) => boolean,
 *   total?: number | null, rowAt?: (index: number) => any, load?: (first: number, last: number) => void,
 *   loading?: boolean, error?: any, retry?: () => void, empty?: any,
 * }} props  `height`: the most pixels that it takes. `onSort`: the server sorts. `rowHeight`: 0 for rows of any height, which are all drawn.
 */
export function Table({ columns, rows = null, label, rowKey, height = 560, rowHeight, sort = "", descending = false, onSort, chosen, total, rowAt, load, loading = false, error, retry, empty }) {
  const box = useRef(/** @type {any} */ (null));
  const [order, setOrder] = useState({ by: sort, descending });
  const [top, setTop] = useState(0);
  const now = onSort ? { by: sort, descending } : order;
  const column = columns.find((each) => each.id === now.by);
  const sorted = useMemo(() => {
    if (!rows || onSort || !column?.by) return rows;
    const by = column.by;
    return [...rows].sort((a, b) => compare(by(a), by(b)) * (now.descending ? -1 : 1));
  }, [rows, column, now.descending, onSort]);
  const count = rowAt ? (total ?? 0) : (sorted?.length ?? 0);
  const size = rowHeight ?? rowSize();
  const seen = Math.ceil(height / (size || 36));
  const all = size === 0 || count <= seen + 2 * OVERSCAN;
  const first = all ? 0 : Math.max(0, Math.min(Math.floor(top / size) - OVERSCAN, count - seen));
  const last = all ? count - 1 : Math.min(count - 1, first + seen + 2 * OVERSCAN);
  useEffect(() => {
    if (load && count) load(first, Math.max(last, 0));
  }, [load, first, last, count > 0]);
  useLayoutEffect(() => {
    if (box.current) box.current.scrollTop = 0;
    setTop(0);
  }, [now.by, now.descending]);

  if (error && !count) return html`<${Failure} error=${error} retry=${retry} />`;
  if (!loading && (rows || rowAt) && !count) return empty ?? html`<${Empty} title="Nothing here" />`;
  const waiting = loading || (!rows && !rowAt);
  const choose = (/** @type {Column<any>} */ each) => {
    const down = now.by === each.id ? !now.descending : Boolean(each.num);
    onSort ? onSort(each.id, down) : setOrder({ by: each.id, descending: down });
  };
  const indexes = waiting ? Array.from({ length: 6 }, (_, i) => i) : Array.from({ length: last - first + 1 }, (_, i) => first + i);
  return html`
    <div class="table" ref=${box} role="region" aria-label=${label} tabindex="0" style=${{ maxHeight: size ? `${height}px` : undefined }} onScroll=${all ? undefined : (/** @type {any} */ event) => setTop(event.currentTarget.scrollTop)}>
      <table aria-rowcount=${count + 1} aria-busy=${String(waiting)}>
        <thead>
          <tr>
            ${columns.map((each) => html`
              <th key=${each.id} scope="col" class=${each.num ? "num" : ""} style=${{ width: each.width }} aria-sort=${now.by === each.id ? (now.descending ? "descending" : "ascending") : undefined}>
                ${each.by ? html`<button type="button" onClick=${() => choose(each)}>${each.label}${now.by === each.id && html`<${Icon} name=${now.descending ? "down" : "up"} size=${11} />`}</button>` : each.label || html`<span class="hidden">Actions</span>`}
              </th>
            `)}
          </tr>
        </thead>
        <tbody>
          ${first > 0 && html`<tr class="space" aria-hidden="true"><td colspan=${columns.length} style=${{ height: `${first * size}px` }}></td></tr>`}
          ${indexes.map((index) => {
            const row = waiting ? null : rowAt ? rowAt(index) : sorted?.[index];
            return html`
              <tr key=${row && rowKey ? rowKey(row, index) : index} aria-rowindex=${index + 2} class=${row && chosen?.(row) ? "chosen" : ""}>
                ${columns.map((each) => html`${cell(each, row)}`)}
              </tr>
            `;
          })}
          ${!waiting && last < count - 1 && html`<tr class="space" aria-hidden="true"><td colspan=${columns.length} style=${{ height: `${(count - 1 - last) * size}px` }}></td></tr>`}
        </tbody>
      </table>
    </div>
  `;
}

/** @param {Column<any>} column @param {any} row */
function cell(column, row) {
  const shown = row ? column.show(row) : html`<span class="skeleton"></span>`;
  return html`<td key=${column.id} class=${`${column.num ? "num" : ""} ${shown === NONE ? "faint" : ""} ${column.class ?? ""}`}>${shown}</td>`;
}

/** As --row says. */
const rowSize = () => Number.parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row")) || 36;

/** Nothing comes last, upwards. @param {any} a @param {any} b */
function compare(a, b) {
  if (a === b) return 0;
  if (a === null || a === undefined) return 1;
  if (b === null || b === undefined) return -1;
  return typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a < b ? -1 : 1;
}
