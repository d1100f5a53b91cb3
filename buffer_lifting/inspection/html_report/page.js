"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, from) => Array.from((from || document).querySelectorAll(selector));
  const one = (id) => document.getElementById(id);
  for (const item of all(".needs-script")) item.hidden = false;

  // light and dark: the system's choice until the button is used
  const saved = { get() { try { return localStorage.getItem("buffer-lifting-theme"); } catch { return null; } },
    set(value) { try { localStorage.setItem("buffer-lifting-theme", value); } catch { /* a page from a file */ } } };
  const button = one("theme");
  const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const label = () => { button.textContent = isDark() ? "Light colours" : "Dark colours"; };
  if (["light", "dark"].includes(saved.get())) root.dataset.theme = saved.get();
  label();
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    saved.set(root.dataset.theme);
    label();
  });

  // a large page: lists that follow are put in place at once, what is in a closed element when it is opened
  let parts = [];
  const large = one("parts");
  async function inflated(element) {
    const bytes = Uint8Array.from(atob(element.textContent), (char) => char.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
  }
  async function place() {
    if (!large) return;
    try { parts = JSON.parse(await inflated(large)); } catch { one("large").hidden = false; return; }
    for (const spot of all("[data-later]")) spot.outerHTML = parts[spot.dataset.later];
  }
  function mark(item) { // the lines of an item that do not match, if it has been read and they are there
    if (item.members) all(".members li", item.element).forEach((line, index) => { line.hidden = item.members[index].hidden; });
  }
  function fill(root) {
    if (!parts.length) return;
    for (const spot of all("[data-body]", root)) {
      spot.innerHTML = parts[spot.dataset.body] || "";
      delete spot.dataset.body;
      const item = known.get(spot.closest("[data-code]"));
      if (item) mark(item);
    }
  }
  document.addEventListener("toggle", (event) => { if (event.target.open) fill(event.target); }, true);

  // search and filter: what is shown is an item whose text has every word, and whose code and target are chosen; of
  // several equal ones in an item, those whose line (with the item's own text) has them
  const search = one("search");
  const suppressed = one("suppressed");
  const target = one("target");
  const boxes = all(".codes input");
  const known = new Map();
  let items = [], cards = [], reads = [], groups = [], links = [];
  function collect() {
    items = all("[data-code]").map((element) => ({ element, members: null, text: "", total: Number(element.dataset.count), shown: 0 }));
    for (const item of items) known.set(item.element, item);
    cards = items.filter((item) => item.element.classList.contains("card"));
    reads = items.filter((item) => item.element.classList.contains("read"));
    groups = all("[data-group]").map((element) => ({ element, items: all("[data-code]", element) }));
    links = all("svg a");
  }
  const names = { lt: "<", gt: ">", quot: '"', amp: "&" };
  const decoded = (match, name) => (name[0] !== "#" ? names[name] || match
    : String.fromCodePoint(name[1] === "x" ? parseInt(name.slice(2), 16) : Number(name.slice(1))));
  const plain = (markup) => markup.replace(/<[^>]*>/g, "").replace(/&(#?\w+);/g, decoded);
  function read(item) { // the text of an item and of its members, once
    const bodies = all("[data-body]", item.element).map((spot) => parts[spot.dataset.body] || "").join("");
    const start = bodies.indexOf('<ul class="members">');
    const list = item.element.querySelector(".members");
    let own = item.element.textContent, lines = [];
    if (start >= 0) {
      const end = bodies.indexOf("</ul>", start);
      lines = bodies.slice(start, end).split("<li>").slice(1).map(plain);
      own += ` ${plain(bodies.slice(0, start))} ${plain(bodies.slice(end))}`;
    } else {
      own += ` ${plain(bodies)}`;
      if (list) { own = own.replace(list.textContent, " "); lines = all("li", list).map((entry) => entry.textContent); }
    }
    item.text = own.toLowerCase();
    item.members = lines.map((line) => ({ text: line.toLowerCase(), hidden: false }));
  }
  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const codes = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    for (const item of items) {
      const data = item.element.dataset;
      const chosen = (!data.code || codes.has(data.code)) && (!target || !target.value || data.target === target.value) &&
        (!("suppressed" in data) || !suppressed || suppressed.checked);
      if (words.length && !item.members) read(item);
      const rest = words.filter((word) => !item.text.includes(word));
      let matching = rest.length ? 0 : item.total, changed = false;
      for (const member of item.members || []) {
        const hidden = !rest.every((word) => member.text.includes(word));
        changed ||= hidden !== member.hidden;
        member.hidden = hidden;
        if (rest.length && !hidden) matching += 1;
      }
      if (changed) mark(item);
      item.shown = chosen ? matching : 0;
      item.element.hidden = !chosen || (rest.length > 0 && !matching);
    }
    for (const group of groups) {
      const left = group.items.filter((item) => !item.hidden).length;
      group.element.hidden = group.items.length > 0 && !left;
      if (group.element.className === "block") group.element.style.containIntrinsicSize = `auto ${left * 8}rem`;
    }
    for (const link of links) link.classList.toggle("dim", one(link.getAttribute("href").slice(1)).hidden);
    const sum = (list, key) => list.reduce((total, item) => total + item[key], 0);
    const text = (list, what) => `${sum(list, "shown")} of ${sum(list, "total")} ${what}`;
    one("shown").textContent = `${text(cards, "findings")}, ${text(reads, "reads and ops")}`;
  }
  let waiting = 0;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 80); });
  for (const control of [...boxes, suppressed, target]) if (control) control.addEventListener("change", filter);
  one("reset").addEventListener("click", () => {
    search.value = "";
    for (const box of boxes) box.checked = true;
    if (suppressed) suppressed.checked = true;
    if (target) target.value = "";
    filter();
  });
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) { event.preventDefault(); search.focus(); }
    if (event.key === "Escape" && document.activeElement === search) { search.value = ""; filter(); }
  });

  // pictures: before, after or both; open and close
  const pictures = one("pictures");
  for (const choice of all("input[name=show]")) {
    choice.addEventListener("change", () => { pictures.className = choice.value === "both" ? "" : `show-${choice.value}`; });
  }
  const toggle = one("toggle");
  if (toggle) toggle.addEventListener("click", () => {
    const shown = all(".read").filter((item) => !item.hidden);
    const open = shown.some((item) => !item.open);
    if (open) for (const item of shown) fill(item);
    for (const item of shown) item.open = open;
  });
  function follow() {
    let found = null;
    try { found = one(decodeURIComponent(location.hash.slice(1))); } catch { /* no fragment of ours */ }
    if (found && found.matches("details")) { fill(found); found.hidden = false; found.open = true; found.scrollIntoView(); }
  }
  addEventListener("hashchange", follow);

  // on paper nothing can be opened
  let closed = [];
  addEventListener("beforeprint", () => {
    fill(document);
    closed = all("details:not([open])");
    for (const item of closed) item.open = true;
  });
  addEventListener("afterprint", () => { for (const item of closed) item.open = false; });

  one("download").addEventListener("click", async () => {
    const data = one("data");
    const text = data.dataset.encoding ? await inflated(data) : data.textContent;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(JSON.parse(text), null, 2)], { type: "application/json" }));
    link.download = "buffer-lifting-report.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });

  const start = () => {
    collect();
    for (const item of all("details[open]")) fill(item);
    filter();
    follow();
  };
  if (large) place().then(start); else start();
})();
