/** The files that will go with the next message: chosen, dropped or pasted, and listed above the field. */

import { byId, h, icon, iconButton, say, setChildren } from "./dom.js";
import { readFile } from "./files.js";
import { toast } from "./frame.js";
import { size } from "./thread.js";

export class Attachments {
  files = []; // { name, text }
  #reading = new Map(); // File -> the list that it will be added to

  /** @param changed called when the files have */
  constructor(changed) {
    this.changed = changed;
    byId("attachment").addEventListener("change", ({ target }) => {
      this.add(target.files);
      target.value = "";
    });
    const { body } = document;
    body.addEventListener("dragover", (event) => {
      if (event.dataTransfer.types.includes("Files")) event.preventDefault();
    });
    body.addEventListener("drop", (event) => {
      if (!event.dataTransfer.files.length) return;
      event.preventDefault();
      this.add(event.dataTransfer.files);
    });
    byId("draft").addEventListener("paste", (event) => {
      if (!event.clipboardData.files.length) return;
      event.preventDefault();
      this.add(event.clipboardData.files);
    });
  }

  get isReading() {
    return this.#named().length > 0;
  }

  /** Show other files, those of another conversation. */
  show(files) {
    this.files = files;
    this.#update();
  }

  /** The files, which are then gone from here. */
  take() {
    const { files } = this;
    this.show([]);
    return files;
  }

  async add(list) {
    const { files } = this; // of the conversation that they were given to
    const added = [...list]; // the field that it came from will be emptied
    for (const file of added) this.#reading.set(file, files);
    this.#update();
    for (const file of added) {
      try {
        files.push(await readFile(file));
        say(`${file.name} is attached`);
      } catch (error) {
        if (error.name !== "FileError") throw error;
        toast(error.message);
      } finally {
        this.#reading.delete(file);
        this.#update();
      }
    }
  }

  /** Names of the files of this list that are still being read. */
  #named() {
    return [...this.#reading].filter(([, files]) => files === this.files).map(([{ name }]) => name);
  }

  #update() {
    const box = byId("attached");
    const read = this.files.map((file) => h("li", {}, icon("file"), h("span.name", { dir: "auto" }, file.name),
      h("small", {}, size(file.text)), iconButton("close", `Remove ${file.name}`, () => {
        this.files.splice(this.files.indexOf(file), 1);
        this.#update();
        byId("draft").focus();
      })));
    const reading = this.#named().map((name) =>
      h("li", { "aria-busy": "true" }, icon("file"), h("span.name", { dir: "auto" }, name), h("small", {}, "reading …")));
    setChildren(box, [...read, ...reading]);
    box.hidden = !box.childElementCount;
    this.changed();
  }
}
