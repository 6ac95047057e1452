// @ts-check
import { get, put } from "../lib/api.js";
import { clock, date, duration } from "../lib/format.js";
import { html, useEffect, useRef, useState } from "../lib/html.js";
import { useQuery, whileSeen } from "../lib/query.js";
import { setQuery } from "../lib/router.js";
import { Button, Card, Empty, Failure, Field, Page, Select, Skeleton, Table, attempt } from "../parts/index.js";

const LEVELS = ["debug", "info", "warning", "error"];
const KEPT = 1000;
/** @type {Record<string, string>} */
const TONES = { warning: "warn", error: "bad", critical: "bad" };
const HEAD = ["event", "level", "time", "room", "pid"];

/** @param {{query: URLSearchParams}} props */
export default function Logs({ query }) {
  const level = query.get("level") ?? "info";
  const room = query.get("room") ?? "";
  const levels = useQuery("/admin/logs/levels", { every: 10 });
  const rooms = Object.keys(levels.data?.rooms ?? {});
  return html`
    <${Page} title="Logs" note="The latest lines of this server, and how much each room writes">
      <div class="grid">
        <div class="w9 stack">
          <div class="row wrap">
            <div class="filter"><${Field} label="Level">${(/** @type {string} */ id) => html`<${Select} id=${id} value=${level} options=${LEVELS.map((each) => ({ value: each, text: `${each} and above` }))} onChange=${(/** @type {string} */ value) => setQuery({ level: value })} />`}<//></div>
            <div class="filter"><${Field} label="Room">${(/** @type {string} */ id) => html`<${Select} id=${id} value=${room} options=${[{ value: "", text: "all" }, ...(room && !rooms.includes(room) ? [room] : []), ...rooms]} onChange=${(/** @type {string} */ value) => setQuery({ room: value })} />`}<//></div>
          </div>
          <${Lines} key=${`${level} ${room}`} level=${level} room=${room} />
        </div>
        <div class="w3"><${Levels} query=${levels} /></div>
      </div>
    <//>
  `;
}

/** @param {{level: string, room: string}} props */
function Lines({ level, room }) {
  const [lines, setLines] = useState(/** @type {any[] | null} */ (null));
  const [error, setError] = useState(/** @type {any} */ (null));
  const [paused, setPaused] = useState(false);
  const latest = useRef(0);
  const box = useRef(/** @type {any} */ (null));
  const read = async () => {
    try {
      const found = await get("/admin/logs/recent", { level, room, limit: latest.current ? KEPT : 300, after: latest.current || null });
      latest.current = found.latest;
      setError(null);
      setLines((old) => (found.lines.length || !old ? [...(old ?? []), ...found.lines].slice(-KEPT) : old));
    } catch (failure) {
      setError(failure);
    }
  };
  useEffect(() => {
    if (paused) return undefined;
    read();
    return whileSeen(read, 2);
  }, [paused]);
  const follows = useRef(true);
  useEffect(() => {
    if (box.current && follows.current) box.current.scrollTop = box.current.scrollHeight;
  }, [lines]);
  if (error && !lines) return html`<${Card}><${Failure} error=${error} retry=${read} /><//>`;
  return html`
    <${Card} flush title="Lines" actions=${html`<${Button} kind="quiet" icon=${paused ? "play" : "pause"} pressed=${paused} onClick=${() => setPaused(!paused)}>${paused ? "Go on" : "Pause"}<//>`}>
      ${!lines
        ? html`<${Skeleton} height=${400} />`
        : !lines.length
          ? html`<${Empty} icon="scroll" title="No such lines">Nothing of this level was written lately.<//>`
          : html`
            <ol class="log" ref=${box} tabindex="0" aria-label="Lines" onScroll=${() => (follows.current = box.current.scrollHeight - box.current.scrollTop - box.current.clientHeight < 40)}>
              ${lines.map((line, index) => html`<${Line} key=${index + latest.current - lines.length} line=${line} />`)}
            </ol>
          `}
    <//>
  `;
}

/** @param {{line: any}} props */
function Line({ line }) {
  const rest = Object.entries(line).filter(([name]) => !HEAD.includes(name));
  const tone = TONES[line.level] ?? "";
  return html`
    <li class=${`log-line ${tone}`}>
      <time class="faint num" title=${date(line.time)}>${clock(line.time)}</time>
      <span class=${`log-level ${tone}`}>${line.level}</span>
      <span class="break"><span class="faint">${line.room}</span> <span class="strong">${line.event}</span> ${rest.map(([name, value]) => html`<span key=${name} class="log-pair"><span class="faint">${name}=</span>${typeof value === "string" ? value : JSON.stringify(value)} </span>`)}</span>
    </li>
  `;
}

/** @param {{query: any}} props */
function Levels({ query }) {
  const [seconds, setSeconds] = useState("600");
  const change = async (/** @type {string} */ room, /** @type {string} */ level) => {
    const passing = level && seconds ? { seconds: Number(seconds) } : {};
    if (await attempt(() => put("/admin/logs/levels", { levels: { [room]: level || null }, ...passing }), level ? `${room} writes ${level} and above` : `${room} writes as it did`)) query.refresh();
  };
  const rows = query.data && Object.entries(query.data.rooms).map(([room, about]) => ({ room, .../** @type {any} */ (about) }));
  const columns = [
    { id: "room", label: "Room", show: (/** @type {any} */ each) => html`<span title=${each.about}>${each.room}</span>${each.seconds_left !== null && html`<br /><span class="small muted num">${duration(each.seconds_left)} left</span>`}` },
    { id: "level", label: "Writes", show: (/** @type {any} */ each) => html`<${Select} label=${`Level of ${each.room}`} value=${each.level} options=${[...LEVELS, ...(each.seconds_left === null ? [] : [{ value: "", text: "as before" }])]} onChange=${(/** @type {string} */ level) => change(each.room, level)} />` },
  ];
  return html`
    <${Card} flush title="Levels">
      <div class="log-for"><${Field} label="A change holds for">${(/** @type {string} */ id) => html`<${Select} id=${id} value=${seconds} options=${[{ value: "60", text: "a minute" }, { value: "600", text: "ten minutes" }, { value: "3600", text: "an hour" }, { value: "", text: "until the server ends" }]} onChange=${setSeconds} />`}<//></div>
      <${Table} label="Levels" columns=${columns} rows=${rows} rowHeight=${0} loading=${query.loading} error=${query.error} retry=${query.refresh} rowKey=${(/** @type {any} */ each) => each.room} />
    <//>
  `;
}
