/* sync_object.c — a new object, and whether what somebody found is one: see sync_layout.h. */
#include "crowd_words.h"

uint64_t sync_bytes(uint32_t kind)
{
    switch (kind) {
    case SYNC_LOCK:
    case SYNC_RLOCK:
    case SYNC_EVENT:
        return SYNC_SMALL;
    case SYNC_SEMAPHORE:
    case SYNC_BOUNDED:
    case SYNC_LEASED:
    case SYNC_RWLOCK:
    case SYNC_CONDITION:
    case SYNC_BARRIER:
        return SYNC_LARGE;
    default:
        return 0;
    }
}

void sync_format(struct sync_object *o, uint32_t kind, uint32_t value, uint32_t limit)
{
    o->header.version = SYNC_VERSION;
    o->header.kind = kind;
    o->header.size = sync_bytes(kind);
    o->header.slots = o->header.size == SYNC_LARGE ? SYNC_SLOTS : 0;
    STORE(o->mutex.watched, kind == SYNC_CONDITION);
    STORE(o->crowd.value, value);
    STORE(o->crowd.limit, limit);
    STORE(o->crowd.event, NOBODY);
    o->header.magic = SYNC_MAGIC;
}

const char *sync_check(const struct sync_object *o, uint64_t bytes, uint32_t kind)
{
    if (bytes < SYNC_SMALL || o->header.magic != SYNC_MAGIC)
        return "this is no synchronisation object";
    if (o->header.version != SYNC_VERSION)
        return "made by another version of ipckit";
    uint32_t found = o->header.kind;
    if (sync_bytes(found) == 0 || o->header.size != sync_bytes(found) || bytes != sync_bytes(found) ||
        o->header.slots != (bytes == SYNC_LARGE ? SYNC_SLOTS : 0))
        return "damaged";
    return kind && found != kind ? "of another kind" : NULL;
}
