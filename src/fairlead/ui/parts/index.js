// @ts-check
/** Everything that pages are made of. */
export { Chart, Sparkline } from "./charts.js";
export { Button, Check, Code, Copy, Copyable, Field, Search, Segments, Select } from "./controls.js";
export { Dialog, attempt, confirm, toast } from "./dialogs.js";
export { Icon, Mark } from "./icons.js";
export { Badge, Card, Empty, Facts, Failure, Loaded, Meter, Notice, Page, Skeleton, Stat, Stats, Status, Tabs } from "./layout.js";
export { Table } from "./table.js";
