// @ts-check
import { html, useEffect, useRef, useState } from "../lib/html.js";
import { Button, Card, Field } from "../parts/index.js";
import { named, useConversation } from "./asking.js";
import { CopyAs } from "./copy-as.js";
import { Said, Verdict } from "./said.js";
import { Sampling } from "./sampling-form.js";
import { samplingOf } from "./sampling.js";
import { ofChat } from "./snippets.js";

/**
 * @param {{model: import("./view.js").Model, sides: import("./view.js").Place[], where: import("./snippets.js").Where}} props
 */
export function Chat({ model, sides, where }) {
  const left = useConversation();
  const right = useConversation();
  const talks = [left, right].slice(0, sides.length);
  const [system, setSystem] = useState("");
  const [text, setText] = useState("");
  const [values, setValues] = useState(/** @type {Record<string, string>} */ ({}));
  const [wrong, setWrong] = useState("");
  const busy = talks.some((each) => each.busy);
  const begun = talks.some((each) => each.turns.length > 0);

  /**
   * @param {import("./asking.js").Turn[]} before
   * @param {string} said
   * @param {import("./view.js").Place} side
   * @returns {Record<string, any>}
   */
  const bodyOf = (before, said, side) => ({
    model: named(side),
    messages: [
      ...(system.trim() ? [{ role: "system", content: system }] : []),
      ...before.flatMap((turn) => [{ role: "user", content: turn.asked }, { role: "assistant", content: turn.answer.text }]),
      ...(said ? [{ role: "user", content: said }] : []),
    ],
    ...samplingOf(values),
  });
  const ask = () => {
    const said = text.trim();
    if (!said || busy) return;
    try {
      samplingOf(values);
    } catch (error) {
      return setWrong(/** @type {Error} */ (error).message);
    }
    setWrong("");
    setText("");
    talks.forEach((talk, index) => {
      const side = /** @type {import("./view.js").Place} */ (sides[index]);
      talk.ask(said, "/v1/chat/completions", (before) => ({ ...bodyOf(before, said, side), stream: true, stream_options: { include_usage: true } }));
    });
  };
  const press = (/** @type {KeyboardEvent} */ event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  };
  const snippets = () => {
    const said = text.trim() || (left.turns.length ? "" : "Hello!");
    const last = left.turns.at(-1);
    const asked = said || last?.asked || "";
    const before = left.turns.filter((turn) => !turn.error && (said || turn !== last));
    return ofChat(where, bodyOf(before, asked, /** @type {import("./view.js").Place} */ (sides[0])));
  };
  return html`
    <div class="grid try">
      <div class="w9 stack">
        <div class=${`try-sides ${sides.length > 1 ? "two" : ""}`}>
          ${talks.map((talk, index) => html`<${Side} key=${index} talk=${talk} title=${named(/** @type {any} */ (sides[index]))} />`)}
        </div>
        ${sides.length > 1 && html`<${Verdict} turns=${talks.map((each) => each.turns.at(-1) ?? null)} names=${sides.map(named)} />`}
        <form class="try-composer" onSubmit=${(/** @type {any} */ event) => (event.preventDefault(), ask())}>
          <label class="hidden" for="try-text">Message</label>
          <textarea class="input" id="try-text" rows="3" placeholder="Say something. Enter sends, Shift+Enter begins a line." value=${text} onInput=${(/** @type {any} */ event) => setText(event.currentTarget.value)} onKeyDown=${press}></textarea>
          <div class="row wrap between">
            <div class="row wrap"><${CopyAs} make=${snippets} where=${where} /><${Button} kind="quiet" icon="trash" disabled=${!begun || busy} onClick=${() => talks.forEach((each) => each.clear())}>Clear<//></div>
            ${busy
              ? html`<${Button} icon="stop" kind="danger" onClick=${() => talks.forEach((each) => each.stop())}>Stop<//>`
              : html`<${Button} icon="send" kind="primary" type="submit" disabled=${!text.trim()}>Send<//>`}
          </div>
          ${wrong && html`<p class="bad small" role="alert">${wrong}</p>`}
        </form>
      </div>
      <div class="w3">
        <${Card} title="Settings">
          <div class="stack">
            <${Field} label="System message">${(/** @type {string} */ id) => html`<textarea class="input" id=${id} rows="3" value=${system} onInput=${(/** @type {any} */ event) => setSystem(event.currentTarget.value)}></textarea>`}<//>
            <${Sampling} values=${values} onChange=${setValues} tools=${model.tools} structured=${model.structured_output} />
          </div>
        <//>
      </div>
    </div>
  `;
}

/** @param {{talk: ReturnType<typeof useConversation>, title: string}} props */
function Side({ talk, title }) {
  const log = useRef(/** @type {any} */ (null));
  const follows = useRef(true);
  useEffect(() => {
    if (log.current && follows.current) log.current.scrollTop = log.current.scrollHeight;
  }, [talk.turns]);
  const scrolled = () => {
    const { scrollTop, scrollHeight, clientHeight } = log.current;
    follows.current = scrollHeight - scrollTop - clientHeight < 40;
  };
  return html`
    <section class="card try-side" aria-label=${title}>
      <header><h2 class="break">${title}</h2></header>
      <div class="try-log" ref=${log} onScroll=${scrolled} role="log" aria-label=${`Conversation with ${title}`} aria-busy=${String(talk.busy)} tabindex="0">
        ${talk.turns.length === 0 && html`<p class="try-nothing muted">Nothing was said yet.</p>`}
        ${talk.turns.map((turn, index) => html`<${Said} key=${index} turn=${turn} busy=${talk.busy && index === talk.turns.length - 1} />`)}
      </div>
    </section>
  `;
}
