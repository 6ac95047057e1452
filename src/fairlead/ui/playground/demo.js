// @ts-check
/** The page of one model, for those who are invited: its form and nothing of the server around it. */
import { html, render, signal, useEffect, useState } from "../lib/html.js";
import { ask, get, session } from "../lib/api.js";
import { Button, Empty, Mark } from "../parts/index.js";
import { Toasts } from "../parts/dialogs.js";
import { Playground } from "./view.js";

const chosen = signal(/** @type {Record<string, string | null>} */ ({}));
const chooseTheme = () => dispatchEvent(new CustomEvent("fairlead-choose-theme", { detail: document.documentElement.dataset.theme === "dark" ? "light" : "dark" }));

/** The token of the address is shown once, and does not stay in it. */
async function enter() {
  const token = location.hash.slice(1);
  if (token) {
    history.replaceState(null, "", location.pathname);
    session.value = await ask("POST", "/ui/enter", { body: { token } });
  } else session.value = await get("/ui/session");
}

function App() {
  const [failed, setFailed] = useState(/** @type {any} */ (null));
  useEffect(() => void enter().catch(setFailed), []);
  const who = /** @type {any} */ (session.value);
  const name = who?.model ?? "";
  useEffect(() => {
    if (name) document.title = `${name} · Fairlead`;
  }, [name]);
  return html`
    <div class="demo">
      <header class="bar">
        <span class="brand"><${Mark} />Fairlead</span>
        <div class="end"><${Button} kind="quiet" icon="moon" label="Dark or light" onClick=${chooseTheme} /></div>
      </header>
      <main id="main">
        <h1>${name || "A model to try"}</h1>
        ${failed
          ? html`<${Empty} icon="key" title="This link does not open the page">${failed.message}<//>`
          : who?.required
            ? html`<${Empty} icon="key" title="Nobody let this browser in yet">Open the link that you were given. It works for as many browsers as it was made for.<//>`
            : name && html`<${Playground} model=${chosen.value.model ?? name} beside=${chosen.value.with ?? null} task=${chosen.value.task ?? null} only onChange=${(/** @type {any} */ changes) => (chosen.value = { ...chosen.value, ...changes })} />`}
      </main>
      <${Toasts} />
    </div>
  `;
}

render(html`<${App} />`, /** @type {HTMLElement} */ (document.getElementById("app")));
