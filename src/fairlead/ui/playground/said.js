// @ts-check
import { has } from "../lib/api.js";
import { number, seconds } from "../lib/format.js";
import { html } from "../lib/html.js";
import { Badge, Code, Icon } from "../parts/index.js";
import { speed } from "./answer.js";
import { blocks } from "./prose.js";

/** @param {{turn: import("./asking.js").Turn, busy: boolean}} props */
export function Said({ turn, busy }) {
  const { answer, error } = turn;
  return html`
    <article class="try-turn">
      ${turn.asked && html`<div class="try-asked"><span class="hidden">You: </span>${turn.asked}</div>`}
      ${answer.reasoning && html`<details class="try-thinking"><summary>Reasoning</summary><${Prose} text=${answer.reasoning} /></details>`}
      ${answer.text && html`<div class="try-answer"><${Prose} text=${answer.text} /></div>`}
      ${answer.calls.map((call, index) => html`<${Code} key=${index} label="Tool call" text=${`${call.name}(${call.arguments})`} />`)}
      ${busy && !answer.text && html`<div class="try-waiting muted" role="status"><${Icon} name="busy" size=${14} />Waiting for the first token</div>`}
      ${error && html`<${Complaint} error=${error} />`}
      ${(answer.first !== null || answer.ended !== null) && !(error && answer.first === null) && html`<${Numbers} turn=${turn} />`}
    </article>
  `;
}

/** The server's own words. @param {{error: import("./answer.js").Complaint}} props */
export const Complaint = ({ error }) => html`
  <div class="notice bad" role="alert"><${Icon} name="bad" /><div><div class="break">${error.message}</div>${error.detail && html`<div class="small mono">${error.detail}</div>`}</div></div>
`;

/** @param {{text: string}} props */
export const Prose = ({ text }) => html`
  ${blocks(text).map((block, index) =>
    block.kind === "code"
      ? html`<${Code} key=${index} text=${block.text} label=${block.language ? `Code, ${block.language}` : "Code"} />`
      : html`<p key=${index} class="try-prose">${block.spans.map((span) => (span.code ? html`<code>${span.text}</code>` : span.strong ? html`<strong>${span.text}</strong>` : span.text))}</p>`,
  )}
`;

/** @param {{turn: import("./asking.js").Turn}} props */
function Numbers({ turn }) {
  const { answer, stopped } = turn;
  const { tokens, exact, firstSeconds, seconds: whole, perSecond } = speed(answer);
  const parts = [
    firstSeconds === null ? "" : `first token ${seconds(firstSeconds)}`,
    `${exact ? "" : "about "}${number(tokens)} ${tokens === 1 ? "token" : "tokens"}`,
    perSecond === null ? "" : `${exact ? "" : "about "}${number(perSecond, perSecond < 10 ? 1 : 0)} tokens/s`,
    whole === null ? "" : `${seconds(whole)} in all`,
    answer.usage?.prompt_tokens ? `prompt ${number(answer.usage.prompt_tokens)}${answer.usage.cached_tokens ? `, ${number(answer.usage.cached_tokens)} cached` : ""}` : "",
  ];
  return html`
    <p class="try-numbers num">
      ${parts.filter(Boolean).join(" · ")}
      ${stopped ? html` <${Badge}>stopped<//>` : answer.finish && answer.finish !== "stop" && html` <${Badge} tone="warn">${answer.finish}<//>`}
      ${answer.ended !== null && answer.requestId && has("requests") && html` <a href=${`/ui/requests/${encodeURIComponent(answer.requestId)}`}>where the time went</a>`}
    </p>
  `;
}

/** Which of two answers was quicker. @param {{turns: (import("./asking.js").Turn | null)[], names: string[]}} props */
export function Verdict({ turns, names }) {
  const ended = turns.map((turn) => (turn && turn.answer.ended !== null && !turn.error && !turn.stopped ? speed(turn.answer) : null));
  const [a, b] = ended;
  const words = [];
  if (a && b) {
    if (a.firstSeconds && b.firstSeconds) words.push(`the first token ${times(names, b.firstSeconds / a.firstSeconds)}`);
    if (a.perSecond && b.perSecond) words.push(`its tokens ${times(names, a.perSecond / b.perSecond)}`);
  }
  return html`<p class="try-verdict muted num" role="status">${words.length ? `Of the last answer: ${words.join("; ")}.` : "\u00a0"}</p>`;
}

/** @param {string[]} names @param {number} ratio of how much better the first is */
const times = (names, ratio) => (Math.max(ratio, 1 / ratio) < 1.05 ? "equally fast" : `${number(Math.max(ratio, 1 / ratio), 1)}× faster from ${names[ratio > 1 ? 0 : 1]}`);
