/** The index of images in IndexedDB: for each file its name, its vector and a thumbnail. */

const IMAGES = "images";

export class Store {
  /** Opens the index of one model: vectors of different models cannot be compared. */
  static async open(identity) {
    const request = indexedDB.open(`vlm-export ${identity}`, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(IMAGES, { keyPath: "key" });
    return new Store(await settled(request));
  }

  constructor(database) {
    this.database = database;
  }

  /** All entries: {key, name, vector: Float32Array, thumbnail: Blob, added: milliseconds}. */
  all() {
    return settled(this.#images("readonly").getAll());
  }

  put(entry) {
    return settled(this.#images("readwrite").put(entry));
  }

  delete(key) {
    return settled(this.#images("readwrite").delete(key));
  }

  clear() {
    return settled(this.#images("readwrite").clear());
  }

  #images(mode) {
    return this.database.transaction(IMAGES, mode).objectStore(IMAGES);
  }
}

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
