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

  // search and filter: what is shown is an item whose text has every word, and whose code and target are chosen; of
  // several equal ones in an item, those whose line (with the item's own text) has them
  const search = one("search");
  const suppressed = one("suppressed");
  const target = one("target");
  const boxes = all(".codes input");
  const items = all("[data-code]").map((element) => {
    const list = element.querySelector(".members");
    const text = list ? element.textContent.replace(list.textContent, " ") : element.textContent;
    const members = list ? all("li", list).map((entry) => ({ entry, text: entry.textContent.toLowerCase() })) : [];
    return { element, members, text: text.toLowerCase(), total: Number(element.dataset.count), shown: 0 };
  });
  const cards = items.filter((item) => item.element.classList.contains("card"));
  const reads = items.filter((item) => item.element.classList.contains("read"));
  const links = all("svg a");
  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const codes = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    for (const item of items) {
      const data = item.element.dataset;
      const chosen = (!data.code || codes.has(data.code)) && (!target || !target.value || data.target === target.value) &&
        (!("suppressed" in data) || !suppressed || suppressed.checked);
      const rest = words.filter((word) => !item.text.includes(word));
      let matching = rest.length ? 0 : item.total;
      for (const { entry, text } of item.members) {
        entry.hidden = !rest.every((word) => text.includes(word));
        if (rest.length && !entry.hidden) matching += 1;
      }
      item.shown = chosen ? matching : 0;
      item.element.hidden = !chosen || (rest.length > 0 && !matching);
    }
    for (const group of all("[data-group]")) {
      group.hidden = all("[data-code]", group).length > 0 && all("[data-code]", group).every((item) => item.hidden);
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
  filter();

  // pictures: before, after or both; open and close
  const pictures = one("pictures");
  for (const choice of all("input[name=show]")) {
    choice.addEventListener("change", () => { pictures.className = choice.value === "both" ? "" : `show-${choice.value}`; });
  }
  const toggle = one("toggle");
  if (toggle) toggle.addEventListener("click", () => {
    const shown = all(".read").filter((item) => !item.hidden);
    const open = shown.some((item) => !item.open);
    for (const item of shown) item.open = open;
  });
  function follow() {
    let place = null;
    try { place = one(decodeURIComponent(location.hash.slice(1))); } catch { /* no fragment of ours */ }
    if (place && place.matches("details")) { place.hidden = false; place.open = true; place.scrollIntoView(); }
  }
  addEventListener("hashchange", follow);
  follow();

  // on paper nothing can be opened
  let closed = [];
  addEventListener("beforeprint", () => { closed = all("details:not([open])"); for (const item of closed) item.open = true; });
  addEventListener("afterprint", () => { for (const item of closed) item.open = false; });

  one("download").addEventListener("click", () => {
    const data = JSON.parse(one("data").textContent);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(data, null, 2)], { type: "application/json" }));
    link.download = "buffer-lifting-report.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });
})();
