"use strict";
// Which tokens of one context stay, for every budget, policy, layer and head: computed here from ranks.
const tokens = (() => {
  // Numbers of two or four bytes, little-endian.
  function unpacked(text, bytes) {
    const raw = atob(text);
    const found = new Array(raw.length / bytes);
    for (let i = 0; i < found.length; i++) {
      let value = 0;
      for (let b = bytes - 1; b >= 0; b--) value = value * 256 + raw.charCodeAt(i * bytes + b);
      found[i] = value;
    }
    return found;
  }

  class Context {
    constructor(data) {
      Object.assign(this, data);
      this.size = data.texts.length;
      this.ranks = data.policies.map((policy) => ({
        uniform: unpacked(policy.in_head, data.bytes.in_head), global: unpacked(policy.in_model, data.bytes.in_model),
      }));
    }

    // How many first and last tokens are always kept: they shrink to half the slots, the last ones first.
    guarded(policy, slots) {
      const room = Math.floor(slots / 2);
      const sinks = Math.min(this.policies[policy].sinks, room);
      return { sinks, recent: Math.min(this.policies[policy].recent, room - sinks) };
    }

    // Whether each slot stays, in the order layer, head, token.
    kept(policy, allocation, slots) {
      const { layers, heads, size } = this;
      const total = layers * heads * size;
      if (slots >= size) return new Uint8Array(total).fill(1);
      const stays = new Uint8Array(total);
      const { sinks, recent } = this.guarded(policy, slots);
      const safe = (i) => i % size < sinks || i % size >= size - recent;
      const ranks = this.ranks[policy][allocation];
      const span = allocation === "uniform" ? size : total;
      const order = new Int32Array(span);
      for (let start = 0; start < total; start += span) {
        let room = (span / size) * slots;
        for (let i = start; i < start + span; i++) {
          order[ranks[i]] = i;
          if (safe(i)) { stays[i] = 1; room--; }
        }
        for (let place = 0; place < span && room > 0; place++) {
          if (!stays[order[place]]) { stays[order[place]] = 1; room--; }
        }
      }
      return stays;
    }

    // Places of a token in the chosen layers and heads; -1 chooses all.
    *chosen(token, layer, head) {
      for (let l = 0; l < this.layers; l++) {
        if (layer >= 0 && l !== layer) continue;
        for (let h = 0; h < this.heads; h++) {
          if (head < 0 || h === head) yield (l * this.heads + h) * this.size + token;
        }
      }
    }
  }

  function share(slots, size) {
    const part = size / slots;
    return Math.abs(part - Math.round(part)) < 0.02 * part && part > 1.5 ? `1/${Math.round(part)}` : `${(100 * slots / size).toFixed(1)}%`;
  }

  function start(data) {
    const context = new Context(data);
    const find = (name) => document.getElementById(`tokens-${name}`);
    const choices = (select, names, from = 0) => names.forEach((name, i) => select.append(new Option(name, i + from)));
    choices(find("policy"), data.policies.map((policy) => policy.name));
    const numbers = (count) => Array.from({ length: count }, (_, i) => String(i));
    choices(find("layer"), ["all", ...numbers(data.layers)], -1);
    choices(find("head"), ["all", ...numbers(data.heads)], -1);
    find("caption").textContent = data.caption;
    const spaces = data.texts.map((text) => text.match(/^\s*/)[0]); // stand outside of what is shaded and struck through
    const spans = data.texts.map((text, i) => {
      const span = document.createElement("span");
      span.className = data.asked.includes(i) ? "token asked" : "token";
      span.dataset.token = i;
      span.textContent = text.slice(spaces[i].length);
      return span;
    });
    spans.forEach((span, i) => find("text").append(spaces[i], span));
    for (const { question, answer } of data.questions) {
      const line = document.createElement("li");
      line.textContent = `${question} → ${answer}`;
      find("questions").append(line);
    }
    find("questions").parentElement.hidden = !data.questions.length;

    const slotsOf = (place) => Math.max(1, Math.round(context.size ** (place / 1000)));
    let slots = data.slots[Math.min(2, data.slots.length - 1)].slots;
    function draw() {
      const [policy, layer, head] = ["policy", "layer", "head"].map((name) => Number(find(name).value));
      const allocation = find("allocation").value;
      const stays = context.kept(policy, allocation, slots);
      const ranks = context.ranks[policy][allocation];
      const last = (allocation === "uniform" ? context.size : ranks.length) - 1;
      let asked = 0;
      spans.forEach((span, i) => {
        let [held, places, score] = [0, 0, 0];
        for (const at of context.chosen(i, layer, head)) {
          held += stays[at];
          score += 1 - ranks[at] / last;
          places += 1;
        }
        span.classList.toggle("evicted", !held);
        span.style.setProperty("--s", (score / places).toFixed(3));
        span.title = `token ${i}: ` + (places > 1 ? `kept in ${held} of ${places} heads` : `${held ? "kept" : "evicted"}, rank ${ranks[[...context.chosen(i, layer, head)][0]] + 1}`);
        asked += held && data.asked.includes(i) ? 1 : 0;
      });
      const total = stays.reduce((sum, one) => sum + one, 0);
      const gone = spans.filter((span) => span.classList.contains("evicted")).length;
      find("slots").value = `${slots} slots a head, ${share(slots, context.size)}`;
      find("slots").dataset.slots = slots;
      find("count").textContent = `${context.size - gone} of ${context.size} tokens stay in ${layer < 0 || head < 0 ? "some head that is shown" : "this head"}; `
        + `${total.toLocaleString("en")} slots in the whole model`
        + (data.asked.length ? `; ${asked} of ${data.asked.length} tokens of asked facts stay.` : ".");
    }
    for (const name of ["policy", "allocation", "layer", "head"]) find(name).addEventListener("change", draw);
    find("budget").addEventListener("input", () => { slots = slotsOf(Number(find("budget").value)); draw(); });
    const move = (value) => {
      slots = value;
      find("budget").value = Math.round(1000 * Math.log(slots) / Math.log(context.size));
      draw();
    };
    for (const { name, slots: value } of data.slots) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = name;
      button.dataset.slots = value;
      button.addEventListener("click", () => move(value));
      find("presets").append(button);
    }
    document.getElementById("tokens").hidden = false;
    move(slots);
    return context;
  }

  return { start, Context };
})();
