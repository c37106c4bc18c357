"use strict";
(() => {
  const PAGE = 12;
  const SVG = "http://www.w3.org/2000/svg";

  const make = (tag, props = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), props);
    node.append(...children);
    return node;
  };
  const svg = (tag, attributes, ...children) => {
    const node = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };

  // Light and dark: the system's choice until the button is used.
  const button = document.getElementById("theme");
  const isDark = () => {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const label = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-pressed", String(isDark()));
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    label();
  });
  label();

  const right = (data, value) => value !== null && (data.better === "higher" ? value >= 1 : value <= 0);
  // An amount has no right and wrong: its number stands there instead of a mark.
  const judged = (data, value) => value !== null && data.kind === "rate";
  const mark = (data, value) => {
    if (value === null) return "not scored";
    if (!judged(data, value)) return String(value);
    return right(data, value) ? "✓" : "✗";
  };
  const outcomes = (data, cells, candidate) => {
    const value = cells[candidate][0];
    const found = ["all"];
    if (judged(data, value) && !right(data, value)) found.push("failed");
    const before = cells[0][0];
    if (candidate > 0 && value !== null && before !== null && value !== before) {
      found.push((value > before) === (data.better === "higher") ? "improved" : "worsened");
    }
    return found;
  };

  const overlay = (data, cell, named) => {
    const [width, height] = cell[2] || [0, 0];
    const layer = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "boxes", "aria-hidden": "true" });
    for (const [name, left, top, rightEdge, bottom] of cell[3]) {
      const title = svg("title", {}, data.strings[name]);
      layer.append(svg("rect", { x: left, y: top, width: rightEdge - left, height: bottom - top }, title));
      if (named) {
        const size = width / 22;
        const y = top > size * 1.3 ? top - size * 0.35 : Math.min(bottom + size, height - 1);
        const text = svg("text", { x: Math.max(left, 0.5), y, "font-size": size, "stroke-width": size / 5 });
        text.append(data.strings[name]);
        layer.append(text);
      }
    }
    return layer;
  };

  const picture = (data, prompt, number, seed, column, named) => {
    const cell = data.prompts[number].seeds[seed][column];
    const frame = make("span", { className: "frame" });
    frame.append(make("img", {
      src: `images/${data.group}-${column}/${number}-${seed}.webp`,
      alt: `${data.names[column]}: ${prompt}, sample ${seed + 1}`,
      loading: "lazy",
    }));
    if (cell[2]) frame.append(overlay(data, cell, named));
    return frame;
  };

  const reference = (data, prompt, number) => make("span", { className: "frame" }, make("img", {
    src: `images/${data.group}-reference/${number}.webp`,
    alt: `the picture to edit: ${prompt}`,
    loading: "lazy",
  }));

  const verdictLine = (data, cell, column) => make(
    "p",
    { className: `said ${!judged(data, cell[0]) ? "" : right(data, cell[0]) ? "right" : "wrong"}` },
    make("b", { textContent: `${data.names[column]} ${mark(data, cell[0])}` }),
    ` ${data.strings[cell[1]]}`,
  );

  const zoom = document.getElementById("zoom");
  let shown = null;
  const enlarge = (gallery, place) => {
    shown = { gallery, place };
    const { data, matches } = gallery;
    const { number, seed } = matches[place];
    const { prompt, task, seeds } = data.prompts[number];
    const columns = gallery.columns();
    const used = document.activeElement.dataset.step;
    const go = (step) => {
      const node = make("button", {
        type: "button",
        textContent: step < 0 ? "← Previous" : "Next →",
        disabled: !matches[place + step],
        onclick: () => enlarge(gallery, place + step),
      });
      node.dataset.step = step;
      return node;
    };
    zoom.replaceChildren(
      make("header", {},
        make("div", {},
          make("h3", { textContent: prompt }),
          make("p", { className: "meta", textContent: `${data.tasks[task].replaceAll("_", " ")}, sample ${seed + 1}, ${place + 1} of ${matches.length}` })),
        make("button", { type: "button", textContent: "Close", onclick: () => zoom.close() })),
      make("div", { className: "pair large" },
        ...(data.references ? [make("figure", {},
          reference(data, prompt, number),
          make("figcaption", {}, make("p", { className: "said", textContent: "the picture to edit" })))] : []),
        ...columns.map((column) => make("figure", {},
        picture(data, prompt, number, seed, column, true),
        make("figcaption", {}, verdictLine(data, seeds[seed][column], column))))),
      make("footer", {}, go(-1), go(1)),
    );
    if (!zoom.open) zoom.showModal();
    // The button in focus was just replaced: without this the keyboard would leave the dialog.
    const again = used && zoom.querySelector(`[data-step="${used}"]:enabled`);
    (again || zoom.querySelector("header button")).focus();
  };
  zoom.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && shown.gallery.matches[shown.place + step]) enlarge(shown.gallery, shown.place + step);
  });
  zoom.addEventListener("click", (event) => { if (event.target === zoom) zoom.close(); });

  const unpack = async (text) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  };

  const start = async (section) => {
    const data = await unpack(section.querySelector("script.data").textContent);
    const form = section.querySelector("form");
    const cards = section.querySelector(".cards");
    const more = section.querySelector(".more");
    const candidate = () => Number(form.elements.candidate ? form.elements.candidate.value : data.names.length - 1);
    const gallery = {
      data,
      matches: [],
      columns: () => (candidate() > 0 ? [0, candidate()] : [0]),
    };
    let drawn = 0;
    let place = 0;

    const card = (number, seeds) => {
      const { prompt, task } = data.prompts[number];
      return make("article", {},
        make("header", {},
          make("h3", { textContent: prompt }),
          make("span", { className: "task", textContent: data.tasks[task].replaceAll("_", " ") })),
        make("div", { className: "seeds" }, ...seeds.map((seed) => {
          const here = place++;
          const cells = data.prompts[number].seeds[seed];
          const found = outcomes(data, cells, candidate());
          const open = make("button", {
            type: "button",
            className: `pair ${found.at(-1)}`,
            onclick: () => enlarge(gallery, here),
          },
          ...(data.references ? [reference(data, prompt, number)] : []),
          ...gallery.columns().map((column) => picture(data, prompt, number, seed, column, false)));
          open.setAttribute("aria-label", `Enlarge sample ${seed + 1} of ${prompt}`);
          return make("div", { className: "seed" }, open,
            ...gallery.columns().map((column) => verdictLine(data, cells[column], column)));
        })));
    };

    const groups = () => {
      const byPrompt = new Map();
      for (const { number, seed } of gallery.matches) {
        byPrompt.set(number, [...(byPrompt.get(number) || []), seed]);
      }
      return [...byPrompt];
    };
    const drawMore = () => {
      const all = groups();
      cards.append(...all.slice(drawn, drawn + PAGE).map(([number, seeds]) => card(number, seeds)));
      drawn = Math.min(drawn + PAGE, all.length);
      more.hidden = drawn >= all.length;
      more.textContent = `Show more (${all.length - drawn} prompts left)`;
    };
    const update = () => {
      const task = form.elements.task.value;
      const outcome = form.elements.outcome.value;
      const counts = {};
      gallery.matches = [];
      data.prompts.forEach((prompt, number) => {
        if (task !== "" && prompt.task !== Number(task)) return;
        prompt.seeds.forEach((cells, seed) => {
          const found = outcomes(data, cells, candidate());
          for (const key of found) counts[key] = (counts[key] || 0) + 1;
          if (found.includes(outcome)) gallery.matches.push({ number, seed });
        });
      });
      for (const node of form.querySelectorAll("[data-count]")) {
        node.textContent = counts[node.dataset.count] || 0;
      }
      const what = data.names.length > 1 ? "pairs" : "pictures";
      section.querySelector(".count").textContent =
        `${gallery.matches.length} ${what} of ${groups().length} prompts`;
      section.classList.toggle("with-boxes", form.elements.boxes.checked);
      cards.replaceChildren();
      drawn = 0;
      place = 0;
      drawMore();
    };
    form.addEventListener("change", (event) => {
      if (event.target.name === "boxes") section.classList.toggle("with-boxes", event.target.checked);
      else update();
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    more.addEventListener("click", drawMore);
    update();
  };
  document.querySelectorAll("section.pictures").forEach(start);
})();
