/* SPDX-License-Identifier: MIT */
/*
 * Which pages of an arena are new when it grows. Pure. Pages may be larger than what lies between two
 * parts of the arena: then parts share one, and it is new only once.
 */
#include "src/mem/shared.h"

static uint64_t down(uint64_t at, uint64_t page) {
    return at / page * page;
}

static uint64_t up(uint64_t at, uint64_t page) {
    return down(at + page - 1, page);
}

/* Where the next part behind the walk's begins that was used already. */
static uint64_t next_used(const struct epi_runs *w) {
    uint64_t part = w->part + 1;
    for (int i = w->use; w->was && i < w->num_uses; i++, part = 0) {
        if (w->was[i].used && part < w->was[i].parts) {
            return w->was[i].at + part * w->was[i].stride;
        }
    }
    return UINT64_MAX;
}

bool epi_next_run(struct epi_runs *w, uint64_t *at, uint64_t *bytes) {
    *bytes = 0;
    for (; w->use < w->num_uses; w->use++, w->part = 0) {
        const struct epi_mem_use *now = &w->now[w->use];
        const uint64_t used = w->was ? w->was[w->use].used : 0;
        for (; now->used && w->part < now->parts; w->part++) {
            const uint64_t start = now->at + w->part * now->stride;
            const uint64_t before = down(next_used(w), w->page);
            const uint64_t end = up(start + now->used, w->page);
            uint64_t from = used ? up(start + used, w->page) : down(start, w->page);
            from = from > w->end ? from : w->end;
            const uint64_t to = end < before ? end : before;
            if (from < to && *bytes && from != *at + *bytes) {
                return true; /* this one comes next */
            }
            if (from < to) {
                *at = *bytes ? *at : from;
                *bytes = to - *at;
            }
            w->end = end > w->end ? end : w->end;
        }
    }
    return *bytes > 0;
}
