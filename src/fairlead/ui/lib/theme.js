// @ts-check
/** Dark or light, before anything is painted: this is a plain script. */
(() => {
  /** @type {string | null} */
  let kept = null;
  try {
    kept = localStorage.getItem("fairlead-theme");
  } catch {
    // a browser that keeps nothing follows the system
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const set = () => (document.documentElement.dataset.theme = kept === "dark" || kept === "light" ? kept : dark.matches ? "dark" : "light");
  set();
  dark.addEventListener("change", () => {
    set();
    dispatchEvent(new Event("fairlead-theme"));
  });
  addEventListener("fairlead-choose-theme", (event) => {
    kept = /** @type {CustomEvent<string>} */ (event).detail;
    try {
      localStorage.setItem("fairlead-theme", kept);
    } catch {
      // for this page, then
    }
    set();
    dispatchEvent(new Event("fairlead-theme"));
  });
})();
