// @ts-check
/** One rollout: where it is, what speaks for and against it, and what can be done. */
import { html } from "../lib/html.js";
import { at, post } from "../lib/api.js";
import { clock, date, duration, number, percent, seconds } from "../lib/format.js";
import { Badge, Button, Card, Empty, Facts, Meter, Notice, Status, Table, confirm, toast } from "../parts/index.js";

/** @type {Record<string, ["ok" | "warn" | "bad" | "info" | "idle" | "busy", string]>} */
export const PHASES = {
  validating: ["busy", "Validating"],
  loading: ["busy", "Loading"],
  progressing: ["busy", "Progressing"],
  paused: ["warn", "Paused"],
  promoted: ["ok", "Promoted"],
  complete: ["ok", "Complete"],
  aborted: ["bad", "Aborted"],
};
const PAUSES = /** @type {Record<string, string>} */ ({ command: "somebody paused it", "no-data": "there was nothing to compare", patience: "a step lacked its sample for too long", hold: "the step waits for somebody to go on" });

/** @param {any} rollout */
export const isRunning = (rollout) => !["complete", "aborted"].includes(rollout.phase);

/** fraud@7, and those that go with it. @param {any} rollout */
export const namesOf = (rollout) => rollout.members.map((/** @type {any} */ each) => `${each.model}@${each.candidate}`).join(", ");

/** @param {any} rollout */
export const Phase = (rollout) => html`<${Status} tone=${PHASES[rollout.phase]?.[0] ?? "info"}>${PHASES[rollout.phase]?.[1] ?? rollout.phase}<//>`;

/** @param {{rollout: any, refresh: () => void, linked?: boolean}} props  `linked`: its name leads to its page. */
export function RolloutPanel({ rollout, refresh, linked = false }) {
  const names = namesOf(rollout);
  return html`
    <${Card} class="rollout" label=${`Rollout of ${names}`} title=${html`<span class="row wrap">${linked ? html`<a href=${at("ui", "rollouts", rollout.id)}>${names}</a>` : names} ${Phase(rollout)} <${Badge}>${rollout.kind}<//><${Badge} title="Policy">${rollout.policy || "its own policy"}<//></span>`}
      actions=${html`<div class="row wrap"><${Acts} rollout=${rollout} refresh=${refresh} /></div>`}>
      <div class="stack">
        ${rollout.phase === "paused" && html`<${Notice} tone="warn">Paused: ${PAUSES[rollout.pause] ?? rollout.reason}${rollout.reason && rollout.pause === "command" ? `: ${rollout.reason}` : ""}. Shares stay as they are.<//>`}
        ${rollout.phase === "aborted" && html`<${Notice} tone="bad">${rollout.reason || "Aborted"}<//>`}
        ${["promoted", "complete"].includes(rollout.phase) && rollout.reason && html`<${Notice} tone="ok">${rollout.reason}<//>`}
        <${Steps} rollout=${rollout} />
        <div class="grid">
          <div class="w4"><${Facts} rows=${facts(rollout)} /></div>
          <div class="w8 stack">${rollout.members.map((/** @type {any} */ each) => html`<${Evidence} key=${each.model} member=${each} several=${rollout.members.length > 1} />`)}</div>
        </div>
        <${Past} history=${rollout.history} />
      </div>
    <//>
  `;
}

/** @param {any} rollout @returns {[string, any][]} */
function facts(rollout) {
  const member = rollout.members[0];
  return [
    ["Champion", rollout.members.map((/** @type {any} */ each) => (each.champion ? `${each.model}@${each.champion}` : "none: its first version")).join(", ")],
    ["Candidate", namesOf(rollout)],
    ["Traffic", rollout.shadow ? `${percent(rollout.shadow)} copied` : `${percent(rollout.share)} to the candidate`],
    ["Step", rollout.step ? `${rollout.step} of ${rollout.steps}` : null],
    ["In this step", rollout.step ? `${duration(rollout.step_seconds)} of ${duration(rollout.least_seconds)}, ${number(member?.step_answers)} of ${number(rollout.least_answers)} answers` : null],
    ["Done in", isRunning(rollout) ? (rollout.eta_seconds === null ? "nobody can say yet" : duration(rollout.eta_seconds)) : null],
    ["Last measured", rollout.last],
    ["Requests", `${number(rollout.requests)}, ${number(rollout.candidate_requests)} of them the candidate's (${percent(rollout.exposure)})`],
    ["Measurements", rollout.num_failed + rollout.num_inconclusive + rollout.num_errors ? `${rollout.num_failed} failed, ${rollout.num_inconclusive} inconclusive and ${rollout.num_errors} errors in a row` : null],
    ["Started", html`${date(rollout.created)} by ${rollout.actor}`],
    ["Ended", rollout.ended ? date(rollout.ended) : null],
  ];
}

/** @param {{rollout: any}} props */
function Steps({ rollout }) {
  const done = ["promoted", "complete"].includes(rollout.phase);
  const share = done ? 1 : rollout.shadow || rollout.share;
  const text = done ? "Everything goes to the candidate" : rollout.phase === "aborted" ? "Everything goes to the champion" : rollout.shadow ? `Copies of ${percent(rollout.shadow)} go to the candidate` : `${percent(share)} of the traffic goes to the candidate`;
  return html`
    <div class="stack tight">
      <div class="row between"><span class="strong">${text}</span>${rollout.step > 0 && !done && html`<span class="muted num">Step ${rollout.step} of ${rollout.steps}</span>`}</div>
      <${Meter} value=${rollout.phase === "aborted" ? 0 : share} label=${text} tone=${done ? "ok" : rollout.phase === "paused" ? "warn" : ""} />
    </div>
  `;
}

const VERDICTS = /** @type {Record<string, [any, string]>} */ ({ worse: ["bad", "Worse"], holds: ["ok", "Holds"], unknown: ["idle", "No data yet"] });

/** @param {{member: any, several: boolean}} props */
function Evidence({ member, several }) {
  /** @type {import("../parts/table.js").Column<any>[]} */
  const columns = [
    { id: "name", label: several ? member.model : "Metric", show: (each) => html`<span class="mono">${each.name}</span>` },
    { id: "champion", label: "Champion", num: true, show: (each) => measured(each.name, each.champion) },
    { id: "candidate", label: "Candidate", num: true, show: (each) => measured(each.name, each.candidate) },
    { id: "tolerance", label: "Tolerance", num: true, show: (each) => (each.name.startsWith("feedback:") ? number(each.tolerance, 3) : percent(each.tolerance)) },
    { id: "evidence", label: "Against it", width: "110px", show: (each) => html`<${Meter} value=${each.evidence} tone=${each.evidence > 0.66 ? "bad" : each.evidence > 0.33 ? "warn" : "ok"} label=${`Evidence against the candidate in ${each.name}`} />` },
    { id: "verdict", label: "Verdict", show: (each) => html`<${Status} tone=${VERDICTS[each.verdict]?.[0] ?? "idle"}>${VERDICTS[each.verdict]?.[1] ?? each.verdict}<//>` },
  ];
  return html`<div class="card"><${Table} label=${`Evidence for ${member.model}@${member.candidate}`} columns=${columns} rows=${member.metrics} rowKey=${(/** @type {any} */ each) => each.name} empty=${html`<${Empty} icon="target" title="Nothing is compared">The policy has no metrics.<//>`} /></div>`;
}

/** @param {string} name @param {any} side */
function measured(name, side) {
  const show = (/** @type {any} */ value) => (/_rate$/.test(name) ? percent(value, 2) : /_p\d/.test(name) ? seconds(value) : number(value, 3));
  if (side?.value === null || side?.value === undefined) return html`<span class="faint">\u2013</span>`;
  const interval = side.low === null || side.high === null ? "" : `between ${show(side.low)} and ${show(side.high)}, from ${number(side.num)}`;
  return html`<span title=${interval}>${show(side.value)}</span>`;
}

/** @param {{history: any[]}} props */
const Past = ({ history }) => html`
  <details>
    <summary class="muted">What happened: ${history.length} events</summary>
    <ol class="stack tight past">
      ${[...history].reverse().map((each, i) => html`
        <li key=${i} class="row wrap"><span class="faint num" title=${date(each.began)}>${clock(each.began)}</span><span class="strong">${PHASES[each.phase]?.[1] ?? each.phase}</span>
          ${each.step >= 0 && html`<span class="muted">step ${each.step + 1}, ${each.shadow ? `${percent(each.shadow)} copied` : percent(each.share)}</span>`}
          <span class="muted break">${each.reason}</span></li>
      `)}
    </ol>
  </details>
`;

/**
 * What is to be asked before a command: named, with what follows.
 * @param {any} rollout @param {string} kind
 */
function question(rollout, kind) {
  const names = namesOf(rollout);
  const champions = rollout.members.map((/** @type {any} */ each) => `${each.model}@${each.champion}`).join(", ");
  const back = rollout.members.every((/** @type {any} */ each) => each.champion) ? `All traffic goes back to ${champions} at once.` : "There is no champion: no version will serve.";
  return /** @type {Record<string, any>} */ ({
    pause: { title: `Pause the rollout of ${names}?`, body: `No further step is taken: the candidate keeps ${percent(rollout.share)} of the traffic. Tests and breakers go on, and may still send it back.`, action: "Pause" },
    resume: { title: `Go on with ${names}?`, body: rollout.hold ? "The next step begins." : "It goes on where it was paused.", action: "Resume" },
    promote: { title: `Promote ${names} now?`, body: `All traffic goes to ${names} at once, whatever the tests still lack. ${champions} is kept loaded for the rollback window.`, action: "Promote" },
    abort: { title: `Abort the rollout of ${names}?`, body: `${back} The version is not rejected.`, action: "Abort", danger: true },
    rollback: { title: `Roll back ${names}?`, body: back, action: "Roll back", danger: true },
  })[kind];
}

/** @param {{rollout: any, refresh: () => void}} props */
function Acts({ rollout, refresh }) {
  const act = (/** @type {string} */ kind) => async () => {
    const did = await confirm({ ...question(rollout, kind), reason: "Why", act: (reason) => post(`${at("admin", "rollouts", rollout.id)}/${kind}`, { reason }) });
    if (did) toast(`${question(rollout, kind).action}: ${namesOf(rollout)}`);
    refresh();
  };
  const phase = rollout.phase;
  return html`
    ${phase === "progressing" && html`<${Button} icon="pause" onClick=${() => void act("pause")()}>Pause<//>`}
    ${phase === "paused" && html`<${Button} icon="play" kind="primary" onClick=${() => void act("resume")()}>Resume<//>`}
    ${["progressing", "paused"].includes(phase) && html`<${Button} icon="up" onClick=${() => void act("promote")()}>Promote<//>`}
    ${["validating", "loading", "progressing", "paused"].includes(phase) && html`<${Button} icon="stop" kind="danger" onClick=${() => void act("abort")()}>Abort<//>`}
    ${phase === "promoted" && html`<${Button} icon="undo" kind="danger" onClick=${() => void act("rollback")()}>Roll back<//>`}
  `;
}
