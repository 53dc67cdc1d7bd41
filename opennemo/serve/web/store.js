/**
 * Conversations, kept in this browser's IndexedDB; only in memory where that is not allowed.
 */

const STORE = "conversations";
let database = null;

/** All conversations, the latest first, and whether they will be kept. */
export async function open() {
  try {
    const opening = indexedDB.open("opennemo", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id" });
    database = await done(opening);
  } catch {
    return { conversations: [], kept: false }; // a private window, say
  }
  const all = await done(database.transaction(STORE).objectStore(STORE).getAll());
  return { conversations: all.sort((a, b) => b.updated - a.updated), kept: true };
}

export async function save(conversation) {
  if (database) await done(writing().put(conversation));
}

export async function remove(conversation) {
  if (database) await done(writing().delete(conversation.id));
}

const writing = () => database.transaction(STORE, "readwrite").objectStore(STORE);

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
