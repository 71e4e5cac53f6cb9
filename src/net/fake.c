/* SPDX-License-Identifier: MIT */
/*
 * A NIC for tests, as weak as the weakest there is and as bad as its seed: endpoints are threads or
 * processes of one host. Owns a box, a memfd, in which its writes wait for each peer; peers map it by
 * way of /proc and take from it what is for them. Runs on the endpoint's thread: bytes move and data
 * is told in the calls of poll, the sender's and then the receiver's, so nothing is ready earlier.
 *
 * What it does that a NIC may do: the source is read late, until EPI_NET_SENT; bytes arrive late and in
 * any order, the data of a write later than its bytes and in another order; half of the writes are
 * sent before they have arrived (completion before visibility); a peer that does not poll stops its
 * senders after a window of writes; keys are the provider's choice and nobody else's; there are
 * few regions and short writes. What a NIC may not do is duplicate: FI_EP_RDM is reliable.
 * What its faults do: not connected, at first or ever; busy; writes of which nobody hears, here or there;
 * links that go down; a death at some call.
 *
 * Decisions are functions of (seed, who, whom, number of the write or try): the same calls meet the same
 * faults, whatever the clock says. Must not look at a clock.
 */
#include "src/net/port.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define WINDOW 8u /* writes to a peer that are on their way: posted receives, there */
#define BOX_MAGIC UINT64_C(0x6570206e65742031)
#define DEFAULT_WRITE_BYTES 4096
#define MOST_WRITE_BYTES (1u << 20)
#define DEFAULT_REGIONS 16u
#define MOST_REGIONS 1024u

enum packet_state { PACKET_FREE, PACKET_SENT, PACKET_PLACED, PACKET_TAKEN, PACKET_REFUSED };

/* A write on its way, in the sender's box. Whoever may change the state owns the rest. */
struct packet {
    _Atomic uint32_t state;
    uint32_t data;
    uint32_t place_after, tell_after; /* polls of the receiver */
    uint64_t key, offset, bytes;
    uint32_t is_silent; /* its data never arrives */
    uint32_t pad;
};

struct box {
    uint64_t magic;
    uint64_t max_bytes, box_bytes;
    int32_t self, num_peers;
    _Atomic uint32_t is_dead;
    uint32_t pad;
};

struct fake_address {
    uint64_t magic, inode;
    int32_t pid, fd;
};

/* What the sender alone knows of a packet. */
struct sending {
    struct epi_net_op *op; /* NULL: free, or told already */
    uint32_t copy_after;   /* its own polls; counted down */
    bool is_copied, is_early, is_lost, is_used;
};

struct fake_peer {
    struct box *theirs;
    uint64_t num_writes, num_tries;
    bool is_broken; /* a write was refused of which this endpoint had told that it was sent */
    struct sending sending[WINDOW];
};

struct fake_region {
    uint64_t key;
    char *start;
    uint64_t bytes;
};

struct fake {
    struct epi_net_port port; /* first */
    struct epi_net_faults f;
    int self, num_peers, box_fd;
    struct box *mine;
    uint64_t num_calls, num_keys;
    struct fake_region region[MOST_REGIONS];
    struct fake_peer peer[];
};

/* ---- decisions ------------------------------------------------------------------------------ */

enum question {
    ASK_AGAIN,
    ASK_COPY,
    ASK_PLACE,
    ASK_TELL,
    ASK_EARLY,
    ASK_SENT,
    ASK_ARRIVED,
    ASK_KEY
};

static uint64_t decide(const struct fake *n, enum question q, int peer, uint64_t number) {
    const uint64_t about[5] = {n->f.seed, (uint64_t)n->self, (uint64_t)peer, number, q};
    uint64_t z = epi_hash(EPI_HASH_BEGIN, about, sizeof(about));
    z = (z ^ (z >> 32)) * UINT64_C(0x9e3779b97f4a7c15);
    return z ^ (z >> 29);
}

static bool chance(const struct fake *n, enum question q, int peer, uint64_t number,
                   uint32_t permille) {
    return decide(n, q, peer, number) % 1000 < permille;
}

static uint32_t delay(const struct fake *n, enum question q, int peer, uint64_t number) {
    return (uint32_t)(decide(n, q, peer, number) % (n->f.max_delay + 1u));
}

/* Counts a call; false: this endpoint is dead, of its seed. */
static bool lives(struct fake *n) {
    if (n->f.kill_at && ++n->num_calls >= n->f.kill_at) {
        atomic_store(&n->mine->is_dead, 1);
        return false;
    }
    return true;
}

/* ---- boxes ---------------------------------------------------------------------------------- */

static uint64_t packet_bytes(uint64_t max_bytes) {
    return (sizeof(struct packet) + max_bytes + 63) / 64 * 64;
}

static struct packet *packet_of(struct box *b, int to, uint32_t slot) {
    return (struct packet *)((char *)(b + 1) +
                             ((uint64_t)to * WINDOW + slot) * packet_bytes(b->max_bytes));
}

static size_t fake_address(struct epi_net_port *port, void *out, size_t room) {
    const struct fake *n = (const struct fake *)port;
    struct stat s = {0};
    fstat(n->box_fd, &s);
    const struct fake_address a = {BOX_MAGIC, s.st_ino, getpid(), n->box_fd};
    memcpy(out, &a, sizeof(a) <= room ? sizeof(a) : 0);
    return sizeof(a);
}

/* A box is mapped when it is what the address says: not what has that number by now. */
static ep_status fake_add_peer(struct epi_net_port *port, int peer, const void *address,
                               size_t bytes) {
    struct fake *n = (struct fake *)port;
    struct fake_address a = {0};
    char path[64];
    struct stat s = {0};
    memcpy(&a, address, bytes == sizeof(a) ? sizeof(a) : 0);
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", a.pid, a.fd);
    epi_fd_begin();
    int fd = epi_fd_keep(a.magic == BOX_MAGIC ? open(path, O_RDWR | O_CLOEXEC) : -1);
    struct box *b = NULL;
    const bool is_there = fd >= 0;
    if (is_there && fstat(fd, &s) == 0 && s.st_ino == a.inode &&
        s.st_size >= (off_t)sizeof(*b)) {
        b = epi_map_shared(fd, (size_t)s.st_size);
    }
    epi_fd_close(&fd);
    if (b && (b->magic != BOX_MAGIC || b->box_bytes != (uint64_t)s.st_size || b->self != peer ||
              b->num_peers != n->num_peers)) {
        munmap(b, (size_t)s.st_size);
        b = NULL;
    }
    if (!b) {
        return epi_fail(a.magic == BOX_MAGIC && !is_there ? EP_ERR_PEER : EP_ERR_ARG,
                        "peer %d has no endpoint at its address (%s)", peer, path);
    }
    n->peer[peer].theirs = b;
    return EP_OK;
}

static void fake_close(struct epi_net_port *port) {
    struct fake *n = (struct fake *)port;
    for (int i = 0; i < n->num_peers; i++) {
        if (n->peer[i].theirs) {
            munmap(n->peer[i].theirs, n->peer[i].theirs->box_bytes);
        }
    }
    if (n->mine) {
        atomic_store(&n->mine->is_dead, 1);
        munmap(n->mine, n->mine->box_bytes);
    }
    epi_fd_close(&n->box_fd);
    epi_free(n);
}

static ep_status make_box(struct fake *n, uint64_t max_bytes) {
    const uint64_t bytes =
        sizeof(struct box) + (uint64_t)n->num_peers * WINDOW * packet_bytes(max_bytes);
    epi_fd_begin();
    n->box_fd = epi_fd_keep(memfd_create("libep-fake-net", MFD_CLOEXEC));
    if (n->box_fd >= 0 && ftruncate(n->box_fd, (off_t)bytes) == 0) {
        n->mine = epi_map_shared(n->box_fd, bytes);
    }
    if (!n->mine) {
        return epi_fail(
            EP_ERR_SYSTEM, "no shared memory of %llu bytes for the fake network: %s",
            (unsigned long long)bytes, strerror(n->box_fd < 0 ? -n->box_fd : errno));
    }
    n->mine->max_bytes = max_bytes;
    n->mine->box_bytes = bytes;
    n->mine->self = n->self;
    n->mine->num_peers = n->num_peers;
    n->mine->magic = BOX_MAGIC;
    return EP_OK;
}

static ep_status fake_open(struct epi_net_port **out, const struct epi_net_config *c) {
    struct fake *n = epi_alloc(sizeof(*n) + (size_t)c->num_peers * sizeof(n->peer[0]));
    if (!n) {
        return epi_fail(EP_ERR_NOMEM, "no memory for a fake network%s", epi_alloc_why());
    }
    n->f = c->faults ? *c->faults : n->f;
    if (sscanf(c->provider, "fake:%" SCNu64 ":%" SCNu32, &n->f.seed,
               &n->f.lost_sent_permille) >= 1) {
        n->f.lost_arrived_permille = n->f.lost_sent_permille;
        n->f.max_delay = 8;
        n->f.connect_tries = 3;
        n->f.again_permille = 100;
    }
    n->f.max_regions = n->f.max_regions ? n->f.max_regions : DEFAULT_REGIONS;
    n->f.max_write_bytes = n->f.max_write_bytes ? n->f.max_write_bytes : DEFAULT_WRITE_BYTES;
    n->self = c->self;
    n->num_peers = c->num_peers;
    n->port = (struct epi_net_port){.ops = &epi_net_fake, .name = "fake"};
    n->port.limits.max_write_bytes = n->f.max_write_bytes;
    ep_status st = EP_OK;
    if (n->f.max_write_bytes > MOST_WRITE_BYTES || n->f.max_regions > MOST_REGIONS) {
        st = epi_fail(EP_ERR_ARG,
                      "the fake network takes writes of %u bytes and %u regions at most",
                      MOST_WRITE_BYTES, MOST_REGIONS);
    } else {
        st = make_box(n, n->f.max_write_bytes);
    }
    if (st != EP_OK) {
        fake_close(&n->port);
        return st;
    }
    *out = &n->port;
    return EP_OK;
}

/* ---- regions -------------------------------------------------------------------------------- */

static ep_status fake_add_region(struct epi_net_port *port, struct epi_net_region *region) {
    struct fake *n = (struct fake *)port;
    for (uint32_t i = 0; i < n->f.max_regions; i++) {
        struct fake_region *r = &n->region[i];
        if (!r->key) {
            *r = (struct fake_region){decide(n, ASK_KEY, -1, ++n->num_keys) | 1, region->start,
                                      region->bytes};
            region->handle = r;
            region->remote.key = r->key;
            return EP_OK;
        }
    }
    return epi_fail(EP_ERR_CAPACITY, "the fake network has no more than %u regions",
                    n->f.max_regions);
}

static void fake_remove_region(struct epi_net_port *port, struct epi_net_region *region) {
    (void)port;
    ((struct fake_region *)region->handle)->key = 0;
}

static struct fake_region *find_region(struct fake *n, const struct packet *p) {
    for (uint32_t i = 0; i < n->f.max_regions; i++) {
        struct fake_region *r = &n->region[i];
        if (r->key && r->key == p->key) {
            return p->bytes <= r->bytes && p->offset <= r->bytes - p->bytes ? r : NULL;
        }
    }
    return NULL;
}

/* ---- the sender ----------------------------------------------------------------------------- */

static ep_status fake_write(struct epi_net_port *port, struct epi_net_op *op) {
    struct fake *n = (struct fake *)port;
    struct fake_peer *p = &n->peer[op->peer];
    const uint64_t number = p->num_writes, tried = p->num_tries++;
    uint32_t slot = 0;
    if (!lives(n)) {
        return epi_fail(EP_ERR_PEER, "this endpoint has died, of its seed");
    }
    if (p->is_broken || atomic_load(&p->theirs->is_dead)) {
        return epi_fail(EP_ERR_PEER, p->is_broken
                                         ? "the connection broke: an earlier write was refused"
                                         : "the connection was closed");
    }
    if (tried < n->f.connect_tries || n->f.again_peer == op->peer + 1 ||
        chance(n, ASK_AGAIN, op->peer, tried, n->f.again_permille)) {
        return EP_AGAIN;
    }
    while (slot < WINDOW && p->sending[slot].is_used) {
        slot++;
    }
    if (slot == WINDOW) {
        return EP_AGAIN;
    }
    p->num_writes++;
    struct packet *k = packet_of(n->mine, op->peer, slot);
    k->data = op->w.data;
    k->key = op->w.to.key;
    k->offset = op->w.to_offset;
    k->bytes = op->w.bytes;
    k->place_after = delay(n, ASK_PLACE, op->peer, number);
    k->tell_after = delay(n, ASK_TELL, op->peer, number);
    k->is_silent = chance(n, ASK_ARRIVED, op->peer, number, n->f.lost_arrived_permille);
    p->sending[slot] = (struct sending){
        .op = op,
        .is_used = true,
        .copy_after = delay(n, ASK_COPY, op->peer, number),
        .is_early = decide(n, ASK_EARLY, op->peer, number) % 2 == 0,
        .is_lost = chance(n, ASK_SENT, op->peer, number, n->f.lost_sent_permille)};
    if (n->f.cut_peer == op->peer + 1 && number >= n->f.cut_at) {
        p->sending[slot].copy_after += n->f.cut_polls ? n->f.cut_polls : UINT32_MAX / 2;
    }
    return EP_OK;
}

/* Tells of a write of this endpoint; true when *done is one. */
static bool move_sending(struct fake *n, int peer, uint32_t slot, struct epi_net_done *done) {
    struct sending *s = &n->peer[peer].sending[slot];
    struct packet *k = packet_of(n->mine, peer, slot);
    const uint32_t state = s->is_copied ? atomic_load(&k->state) : PACKET_FREE;
    bool is_told = false;
    if (!s->is_copied) {
        if (s->copy_after > 0) {
            s->copy_after--;
            return false;
        }
        memcpy(k + 1, (const char *)s->op->w.from->start + s->op->w.from_offset, k->bytes);
        s->is_copied = true;
        atomic_store(&k->state, PACKET_SENT);
    }
    if (s->op && !s->is_lost && (s->is_early || state >= PACKET_TAKEN)) {
        *done = (struct epi_net_done){.op = s->op, .status = EP_OK};
        if (state == PACKET_REFUSED) {
            done->status = EP_ERR_ARG;
            epi_format(
                done->why, sizeof(done->why),
                "the peer has refused a write of %llu bytes: its region has another key, "
                "or is smaller",
                (unsigned long long)k->bytes);
        }
        s->op = NULL;
        is_told = true;
    }
    if (state >= PACKET_TAKEN && !s->op) {
        n->peer[peer].is_broken |= state == PACKET_REFUSED;
        atomic_store(&k->state, PACKET_FREE);
        s->is_used = false;
    }
    return is_told;
}

/* ---- the receiver --------------------------------------------------------------------------- */

/* One poll brings a packet one step on; true when its data is told. */
static bool move_arriving(struct fake *n, struct packet *k, uint64_t max_bytes,
                          struct epi_net_done *done) {
    const uint32_t state = atomic_load(&k->state);
    if (state == PACKET_SENT && k->place_after-- == 0) {
        const struct fake_region *r = k->bytes <= max_bytes ? find_region(n, k) : NULL;
        if (r) {
            memcpy(r->start + k->offset, k + 1, k->bytes);
        }
        atomic_store(&k->state, r ? PACKET_PLACED : PACKET_REFUSED);
    } else if (state == PACKET_PLACED && k->tell_after-- == 0) {
        const bool is_told = !k->is_silent;
        *done = (struct epi_net_done){.data = k->data};
        atomic_store(&k->state, PACKET_TAKEN);
        return is_told;
    }
    return false;
}

static int fake_poll(struct epi_net_port *port, struct epi_net_done *done, int max) {
    struct fake *n = (struct fake *)port;
    int num = 0;
    if (!lives(n)) {
        return 0;
    }
    for (int i = 0; i < n->num_peers; i++) {
        struct fake_peer *p = &n->peer[i];
        for (uint32_t slot = 0; p->theirs && slot < WINDOW && num < max; slot++) {
            num += p->sending[slot].is_used && move_sending(n, i, slot, &done[num]);
            if (num < max) {
                num += move_arriving(n, packet_of(p->theirs, n->self, slot),
                                     p->theirs->max_bytes, &done[num]);
            }
        }
    }
    return num;
}

static int fake_wait_fd(struct epi_net_port *port) {
    (void)port;
    return -1;
}

const struct epi_net_ops epi_net_fake = {.size = sizeof(struct epi_net_ops),
                                         .open = fake_open,
                                         .address = fake_address,
                                         .add_peer = fake_add_peer,
                                         .add_region = fake_add_region,
                                         .remove_region = fake_remove_region,
                                         .write = fake_write,
                                         .poll = fake_poll,
                                         .wait_fd = fake_wait_fd,
                                         .close = fake_close};
