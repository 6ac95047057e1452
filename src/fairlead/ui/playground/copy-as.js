// @ts-check
import { html, useState } from "../lib/html.js";
import { Button, Code, Dialog, Empty, Tabs } from "../parts/index.js";

/**
 * The request as code. It is written when it is asked for.
 * @param {{make: () => import("./snippets.js").Snippet[], where: import("./snippets.js").Where}} props  `make` may throw a RangeError: what is wrong with the form.
 */
export function CopyAs({ make, where }) {
  const [open, setOpen] = useState(false);
  const [chosen, setChosen] = useState("curl");
  return html`
    <${Button} icon="copy" onClick=${() => setOpen(true)}>Copy as code<//>
    <${Dialog} open=${open} onClose=${() => setOpen(false)} title="This request as code" wide>
      ${open && html`<${Inside} make=${make} where=${where} chosen=${chosen} onChoose=${setChosen} />`}
      <footer><${Button} onClick=${() => setOpen(false)}>Close<//></footer>
    <//>
  `;
}

/** @param {{make: () => import("./snippets.js").Snippet[], where: import("./snippets.js").Where, chosen: string, onChoose: (id: string) => void}} props */
function Inside({ make, where, chosen, onChoose }) {
  if (!where.url) return html`<${Empty} icon="link" title="No address for programs">From this machine only the page can be reached, not the server's own ports.<//>`;
  let snippets;
  try {
    snippets = make();
  } catch (error) {
    return html`<${Empty} icon="warn" title="The form is not complete">${/** @type {Error} */ (error).message}<//>`;
  }
  const shown = snippets.find((each) => each.id === chosen) ?? snippets[0];
  if (!shown) return html`<${Empty} icon="warn" title="There is no code for this" />`;
  return html`
    <${Tabs} label="Language" tabs=${snippets.map((each) => ({ id: each.id, text: each.label }))} chosen=${shown.id} onChoose=${onChoose} />
    <div role="tabpanel" aria-label=${shown.label}><${Code} text=${shown.text} label=${shown.label} /></div>
    ${where.keys && html`<p class="muted small">The key is read from the environment variable <code>FAIRLEAD_API_KEY</code>.</p>`}
  `;
}
