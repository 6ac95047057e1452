// @ts-check
/** The frame around every page: navigation, search, login, keys, and what is live. */
import { html, render, signal, useEffect, useLayoutEffect, useRef, useState } from "./lib/html.js";
import { get, has, login, logout, session, whoLooks, Problem } from "./lib/api.js";
import * as keys from "./lib/keys.js";
import * as live from "./lib/live.js";
import { follow, go, match, place } from "./lib/router.js";
import { Button, Dialog, Empty, Failure, Field, Icon, Mark, Page, Skeleton, Status } from "./parts/index.js";
import { Questions, Toasts } from "./parts/dialogs.js";
import { GROUPS, HOME, PAGES } from "./pages/index.js";

const open = signal(false);
const helping = signal(false);

/** The page of a path, and what its pattern found. @param {string} path */
function pageOf(path) {
  for (const entry of PAGES) {
    const params = match(entry.path, path);
    if (params) return { entry, params };
  }
  return null;
}

function App() {
  const [failed, setFailed] = useState(/** @type {any} */ (null));
  const ask = () => whoLooks().then(() => setFailed(null), setFailed);
  useEffect(() => void ask(), []);
  const who = session.value;
  useEffect(() => {
    if (who && !who.required) live.watch();
    else live.rest();
  }, [who?.required]);
  if (failed) return html`<div class="login"><${Failure} error=${failed} retry=${ask} /></div>`;
  if (!who) return null;
  if (who.required) return html`<${Login} />`;
  return html`<${Shell} />`;
}

function Shell() {
  const path = place.value.path;
  const main = useRef(/** @type {any} */ (null));
  const first = useRef(true);
  // At once: what is focused after the page is there must not lose it again.
  useLayoutEffect(() => {
    open.value = false;
    if (/^\/ui\/?$/.test(path)) return go(HOME, { replace: true });
    if (!first.current) main.current?.focus({ preventScroll: true });
    first.current = false;
  }, [path]);
  const found = pageOf(path);
  return html`
    <a class="skip" href="#main" onClick=${(/** @type {any} */ event) => (event.preventDefault(), main.current?.focus())}>Skip to the page</a>
    <div class=${`shell ${open.value ? "open" : ""}`}>
      <${Side} path=${found?.entry.beneath ?? found?.entry.path ?? path} />
      ${open.value && html`<button class="scrim" type="button" aria-label="Close the navigation" onClick=${() => (open.value = false)}></button>`}
      <${Bar} />
      <main id="main" ref=${main} tabindex="-1">
        ${found ? html`<${Drawn} key=${path} entry=${found.entry} params=${found.params} />` : !/^\/ui\/?$/.test(path) && html`<${Page} title="No such page"><${Empty} icon="search" title="Nothing is at this address">The navigation has every page.<//><//>`}
      </main>
    </div>
    <${Questions} /><${Toasts} /><${Keys} />
  `;
}

/** @type {Map<string, any>} */
const drawn = new Map();

/** A page, once its file is here. @param {{entry: import("./pages/index.js").PageEntry, params: Record<string, string>}} props */
function Drawn({ entry, params }) {
  const [, again] = useState(0);
  const [failed, setFailed] = useState(false);
  const View = drawn.get(entry.path);
  useEffect(() => {
    if (View) return;
    entry.load().then(
      (module) => {
        drawn.set(entry.path, module.default);
        again((old) => old + 1);
      },
      () => setFailed(true),
    );
  }, [entry]);
  if (entry.needs && !has(entry.needs)) {
    return html`<${Page} title=${entry.title}><${Empty} icon="key" title="This server has none of it">It needs a store (\`store.url\`), or the part is turned off in fairlead.yaml.<//><//>`;
  }
  if (failed) {
    return html`<${Page} title=${entry.title}><${Empty} icon="refresh" title="This page could not be read">The server was perhaps updated since this tab was opened. <${Button} onClick=${() => location.reload()}>Reload<//><//><//>`;
  }
  if (!View) return html`<${Page} title=${entry.title}><${Skeleton} height=${320} /><//>`;
  return html`<${View} params=${params} query=${place.value.query} />`;
}

/** @param {{path: string}} props */
const Side = ({ path }) => html`
  <aside class="side" id="side">
    <a class="brand" href=${HOME}><${Mark} />Fairlead</a>
    <nav aria-label="Pages">
      ${GROUPS.map((group) => {
        const pages = PAGES.filter((each) => each.group === group);
        return pages.length > 0 && html`
          <h2 id=${`nav-${group}`}>${group}</h2>
          <ul aria-labelledby=${`nav-${group}`}>
            ${pages.map((each) => html`
              <li key=${each.path}>
                <a href=${each.path} aria-current=${each.path === path ? "page" : undefined}><${Icon} name=${each.icon ?? "list"} />${each.title}${each.key && html`<kbd aria-hidden="true">g ${each.key}</kbd>`}</a>
              </li>
            `)}
          </ul>
        `;
      })}
    </nav>
    <footer>Fairlead ${session.value?.version}</footer>
  </aside>
`;

function Bar() {
  const dark = document.documentElement.dataset.theme === "dark";
  const [, again] = useState(0);
  useEffect(() => {
    const changed = () => again((old) => old + 1);
    addEventListener("fairlead-theme", changed);
    return () => removeEventListener("fairlead-theme", changed);
  }, []);
  const who = session.value;
  return html`
    <header class="bar">
      <button class="button quiet icon burger" type="button" aria-label="Navigation" aria-expanded=${String(open.value)} aria-controls="side" onClick=${() => (open.value = !open.value)}><${Icon} name="menu" /></button>
      <${Finder} />
      <div class="end">
        <${Feed} />
        <${Button} kind="quiet" icon=${dark ? "sun" : "moon"} label=${dark ? "Light colours" : "Dark colours"} onClick=${chooseTheme} />
        <span class="hide-small"><${Button} kind="quiet" label="Keys" onClick=${() => (helping.value = true)}>?<//></span>
        ${who?.who && html`<${Button} kind="quiet" icon="out" label=${`Log out ${who.who}`} onClick=${logout} />`}
      </div>
    </header>
  `;
}

const chooseTheme = () => dispatchEvent(new CustomEvent("fairlead-choose-theme", { detail: document.documentElement.dataset.theme === "dark" ? "light" : "dark" }));

const FEEDS = /** @type {Record<string, [any, string, string]>} */ ({
  live: ["ok", "Live", "Numbers come every two seconds"],
  connecting: ["busy", "Connecting", "The server is being asked"],
  late: ["warn", "Not live", "The last numbers are old: the server is asked again"],
  off: ["idle", "Paused", "Nobody looks at this tab"],
});

function Feed() {
  const [tone, text, title] = /** @type {[any, string, string]} */ (FEEDS[live.feed.value]);
  return html`<span title=${title} role="status"><${Status} tone=${tone}>${text}<//></span>`;
}

/** Pages and models by name. The server looks for models: there may be ten thousand. */
function Finder() {
  const input = useRef(/** @type {any} */ (null));
  const [text, setText] = useState("");
  const [models, setModels] = useState(/** @type {any[]} */ ([]));
  const [chosen, setChosen] = useState(0);
  const [shown, setShown] = useState(false);
  useEffect(() => keys.on("/", "Search", () => input.current?.focus()), []);
  useEffect(() => {
    if (!text.trim()) return setModels([]);
    const abort = new AbortController();
    const timer = setTimeout(() => {
      get("/ui/models.json", { search: text.trim(), limit: 8 }, abort.signal).then((found) => setModels(found.models), () => {});
    }, 120);
    return () => {
      clearTimeout(timer);
      abort.abort();
    };
  }, [text]);
  const wanted = text.trim().toLowerCase();
  const found = !wanted
    ? []
    : [
        ...PAGES.filter((each) => each.group && each.title.toLowerCase().includes(wanted)).map((each) => ({ href: each.path, text: each.title, kind: "page", icon: each.icon ?? "list" })),
        ...models.map((each) => ({ href: `/ui/models/${encodeURIComponent(each.name)}`, text: each.name, kind: "model", icon: "box" })),
      ];
  const visit = (/** @type {string} */ href) => {
    setText("");
    setShown(false);
    input.current?.blur();
    go(href);
  };
  const press = (/** @type {KeyboardEvent} */ event) => {
    const step = event.key === "ArrowDown" ? 1 : event.key === "ArrowUp" ? -1 : 0;
    if (event.key === "Escape") {
      setText("");
      input.current?.blur();
    } else if (step && found.length) {
      event.preventDefault();
      setChosen((chosen + step + found.length) % found.length);
    } else if (event.key === "Enter") {
      const hit = found[Math.min(chosen, found.length - 1)];
      if (hit) visit(hit.href);
    }
  };
  const opened = shown && wanted !== "";
  return html`
    <div class="search">
      <${Icon} name="search" />
      <input
        class="input" ref=${input} type="text" role="combobox" aria-label="Search pages and models" aria-expanded=${String(opened)} aria-controls="found" aria-autocomplete="list"
        aria-activedescendant=${opened && found.length ? `found-${Math.min(chosen, found.length - 1)}` : undefined} placeholder="Search" autocomplete="off" spellcheck=${false} value=${text}
        onInput=${(/** @type {any} */ event) => (setText(event.currentTarget.value), setChosen(0), setShown(true))} onKeyDown=${press} onFocus=${() => setShown(true)} onBlur=${() => setShown(false)}
      />
      <kbd aria-hidden="true">/</kbd>
      ${opened && html`
        <div class="found">
          <ul id="found" role="listbox" aria-label="Found">
            ${found.map((each, i) => html`
              <li key=${each.href} id=${`found-${i}`} role="option" aria-selected=${String(i === Math.min(chosen, found.length - 1))} onPointerDown=${(/** @type {any} */ event) => (event.preventDefault(), visit(each.href))}>
                <${Icon} name=${each.icon} /><span class="clip">${each.text}</span><small>${each.kind}</small>
              </li>
            `)}
          </ul>
          ${found.length === 0 && html`<p>Nothing has “${text.trim()}” in its name</p>`}
        </div>
      `}
    </div>
  `;
}

function Keys() {
  useEffect(() => keys.on("?", "These keys", () => (helping.value = true)), []);
  const rows = [...keys.shortcuts].sort(([a], [b]) => a.length - b.length || a.localeCompare(b));
  return html`
    <${Dialog} open=${helping.value} onClose=${() => (helping.value = false)} title="Keys">
      <dl class="facts">${rows.map(([combination, { what }]) => html`<dt key=${combination}>${combination.split(" ").map((each) => html`<kbd>${each}</kbd> `)}</dt><dd>${what}</dd>`)}</dl>
      <footer><${Button} onClick=${() => (helping.value = false)}>Close<//></footer>
    <//>
  `;
}

function Login() {
  const [key, setKey] = useState("");
  const [failed, setFailed] = useState("");
  const [busy, setBusy] = useState(false);
  useEffect(() => void (document.title = "Log in \u00b7 Fairlead"), []);
  const enter = async (/** @type {any} */ event) => {
    event.preventDefault();
    setBusy(true);
    setFailed("");
    try {
      await login(key.trim());
    } catch (error) {
      setFailed(error instanceof Problem ? error.message : String(error));
    }
    setBusy(false);
  };
  return html`
    <main class="login">
      <form onSubmit=${enter}>
        <h1 class="brand"><${Mark} size=${30} />Fairlead</h1>
        <p class="muted">This server must know who looks. The key needs the scope <code>admin</code>.</p>
        <${Field} label="Key" type="password" name="key" autocomplete="current-password" spellcheck=${false} required autofocus value=${key} onInput=${setKey} error=${failed} hint=${html`<code>fairlead keys create --scope admin</code> makes one`} />
        <${Button} type="submit" kind="primary" busy=${busy} disabled=${!key.trim()}>Log in<//>
      </form>
    </main>
  `;
}

follow();
live.followVisibility();
keys.listen();
for (const each of PAGES) if (each.key) keys.on(`g ${each.key}`, `Go to ${each.title}`, () => go(each.path));
keys.on("t", "Dark or light", chooseTheme);
render(html`<${App} />`, /** @type {HTMLElement} */ (document.getElementById("app")));
