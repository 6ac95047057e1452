// @ts-check
import { post } from "../lib/api.js";
import { number, seconds } from "../lib/format.js";
import { html, useState } from "../lib/html.js";
import { Button, Card, Facts, Field, Meter } from "../parts/index.js";
import { DATA, complained, named } from "./asking.js";
import { CopyAs } from "./copy-as.js";
import { Complaint } from "./said.js";
import { ofEmbeddings } from "./snippets.js";

/** How near two texts are. @param {{sides: import("./view.js").Place[], where: import("./snippets.js").Where}} props */
export function Embeddings({ sides, where }) {
  const [texts, setTexts] = useState(["", ""]);
  const [found, setFound] = useState(/** @type {{cosine: number, size: number, tokens: number, seconds: number} | null} */ (null));
  const [error, setError] = useState(/** @type {import("./answer.js").Complaint | null} */ (null));
  const body = { model: named(/** @type {any} */ (sides[0])), input: texts };
  const ask = async () => {
    const began = performance.now();
    setError(null);
    try {
      const answer = await post(`${DATA}/v1/embeddings`, body);
      const [a, b] = answer.data.map((/** @type {any} */ each) => each.embedding);
      setFound({ cosine: cosine(a, b), size: a.length, tokens: answer.usage.prompt_tokens, seconds: (performance.now() - began) / 1000 });
    } catch (failure) {
      setFound(null);
      setError(complained(failure));
    }
  };
  return html`
    <div class="grid">
      <div class="w8">
        <${Card} title="Two texts">
          <div class="stack">
            ${texts.map((text, index) => html`
              <${Field} key=${index} label=${index ? "Second text" : "First text"}>${(/** @type {string} */ id) => html`<textarea class="input" id=${id} rows="3" value=${text} onInput=${(/** @type {any} */ event) => setTexts(texts.map((each, at) => (at === index ? event.currentTarget.value : each)))}></textarea>`}<//>
            `)}
            <div class="row wrap between">
              <${CopyAs} make=${() => ofEmbeddings(where, body)} where=${where} />
              <${Button} kind="primary" icon="send" disabled=${!texts.every((each) => each.trim())} onClick=${ask}>Compare<//>
            </div>
            ${error && html`<${Complaint} error=${error} />`}
          </div>
        <//>
      </div>
      <div class="w4">
        <${Card} title="How near they are">
          <div class="stack" role="status">
            <strong class="try-cosine num">${found ? found.cosine.toFixed(4) : "\u2013"}</strong>
            <${Meter} value=${found ? Math.max(found.cosine, 0) : 0} label="Cosine of the two vectors" />
            <${Facts} rows=${[["Numbers in a vector", number(found?.size)], ["Tokens", number(found?.tokens)], ["Time", seconds(found?.seconds)]]} />
          </div>
        <//>
      </div>
    </div>
  `;
}

/** @param {number[]} a @param {number[]} b */
function cosine(a, b) {
  const dot = (/** @type {number[]} */ x, /** @type {number[]} */ y) => x.reduce((sum, value, index) => sum + value * (y[index] ?? 0), 0);
  return dot(a, b) / (Math.sqrt(dot(a, a) * dot(b, b)) || 1);
}
