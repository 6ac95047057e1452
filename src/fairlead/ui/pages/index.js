// @ts-check
/** Every page: its address, where it is in the navigation, and the file that draws it. README.md says how to add one. */

/**
 * @typedef {object} PageEntry
 * @property {string} path  /ui/models/:model gives the page `params.model`.
 * @property {string} title
 * @property {() => Promise<{default: (props: {params: Record<string, string>, query: URLSearchParams}) => any}>} load
 * @property {"Watch" | "Serve" | "Try" | "Manage"} [group]  In the navigation; none: reached from another page.
 * @property {string} [icon]  Of parts/icons.js.
 * @property {string} [key]  `g` and then this one goes there.
 * @property {string} [beneath]  Path of the page that is marked in the navigation, for one that is not there.
 * @property {string} [needs]  A feature (lib/api.js `has`) without which the page says why there is nothing.
 */

/** @type {PageEntry[]} */
export const PAGES = [
  { path: "/ui/overview", title: "Overview", group: "Watch", icon: "pulse", key: "o", load: () => import("./overview.js") },
  { path: "/ui/models", title: "Models", group: "Serve", icon: "box", key: "m", load: () => import("./models.js") },
  { path: "/ui/models/:model", title: "Model", beneath: "/ui/models", load: () => import("./model.js") },
  { path: "/ui/rollouts", title: "Rollouts", group: "Serve", icon: "branch", key: "r", needs: "rollouts", load: () => import("./rollouts.js") },
  { path: "/ui/rollouts/:rollout", title: "Rollout", beneath: "/ui/rollouts", needs: "rollouts", load: () => import("./rollout.js") },
  { path: "/ui/replicas", title: "Replicas", group: "Serve", icon: "chip", key: "d", load: () => import("./replicas.js") },
  { path: "/ui/requests", title: "Requests", group: "Watch", icon: "clock", key: "q", needs: "requests", load: () => import("./requests.js") },
  { path: "/ui/requests/:request", title: "Request", beneath: "/ui/requests", needs: "requests", load: () => import("./request.js") },
  { path: "/ui/slo", title: "Objectives", group: "Watch", icon: "target", key: "s", needs: "slo", load: () => import("./slo.js") },
  { path: "/ui/logs", title: "Logs", group: "Watch", icon: "scroll", key: "l", needs: "logs", load: () => import("./logs.js") },
  { path: "/ui/jobs", title: "Jobs", group: "Serve", icon: "list", key: "j", needs: "jobs", load: () => import("./jobs.js") },
  { path: "/ui/jobs/:job", title: "Job", beneath: "/ui/jobs", needs: "jobs", load: () => import("./job.js") },
  { path: "/ui/playground", title: "Playground", group: "Try", icon: "chat", key: "p", load: () => import("./playground.js") },
  { path: "/ui/tenants", title: "Tenants", group: "Manage", icon: "users", key: "u", needs: "tenants", load: () => import("./tenants.js") },
  { path: "/ui/tenants/:tenant", title: "Tenant", beneath: "/ui/tenants", needs: "tenants", load: () => import("./tenant.js") },
  { path: "/ui/audit", title: "Audit", group: "Manage", icon: "key", key: "a", needs: "audit", load: () => import("./audit.js") },
  { path: "/ui/config", title: "Configuration", group: "Manage", icon: "gear", key: "c", needs: "config", load: () => import("./config.js") },
];

export const GROUPS = /** @type {const} */ (["Watch", "Serve", "Try", "Manage"]);
export const HOME = "/ui/overview";
