/* SPDX-License-Identifier: MIT */
/*
 * An endpoint on any provider: which writes wait, which are under way, until when, and which peers are
 * lost. Owns the ops, so many for each peer; the provider has some of them between its write and
 * its poll. Runs on the endpoint's thread.
 *
 * A peer's writes are a list in order of their calls, of which the first ones are posted and the rest
 * wait for the NIC to take them. Only the head of the list can be the first to run out of time.
 * Must not hold up one peer for another: who waits is tried once in each poll, whatever the others do.
 */
#include "src/net/port.h"

#include <string.h>

#define DEFAULT_IN_FLIGHT 64
#define BATCH 16        /* what is taken from the provider at once */
#define CLOCK_POLLS 64u /* polls that find something, between two looks at the clock */
#define CLOSE_NAP_NS (50 * EPI_NS_PER_US)

enum peer_state { PEER_ABSENT, PEER_HERE, PEER_LOST, PEER_TOLD };

struct peer {
    enum peer_state state;
    ep_status status;
    struct epi_net_op *first, *last; /* all that have not ended */
    struct epi_net_op *waiting;      /* the first of them that is not posted */
    struct epi_net_op *free;
    char why[EPI_NET_TEXT_BYTES];
};

struct epi_net {
    const struct epi_net_ops *ops;
    struct epi_net_port *port;
    struct epi_net_config config;
    int num_under_way, num_waiting, num_untold;
    uint32_t num_polls;
    struct epi_net_op *op; /* [num_peers][max_in_flight] */
    struct peer peer[];
};

/* What an address begins with. */
struct address_head {
    char provider[48];
    uint32_t bytes, magic;
};
#define ADDRESS_MAGIC 0x45504e31u /* "EPN1" */

_Static_assert(sizeof(struct address_head) == 56, "address_head");

/* ---- lists ---------------------------------------------------------------------------------- */

static void append_op(struct peer *p, struct epi_net_op *op) {
    op->next = NULL;
    op->before = p->last;
    *(p->last ? &p->last->next : &p->first) = op;
    p->last = op;
    if (!p->waiting) {
        p->waiting = op;
    }
}

static void end_op(struct epi_net *net, struct epi_net_op *op) {
    struct peer *p = &net->peer[op->peer];
    *(op->before ? &op->before->next : &p->first) = op->next;
    *(op->next ? &op->next->before : &p->last) = op->before;
    if (p->waiting == op) {
        p->waiting = op->next;
    }
    net->num_waiting -= !op->is_posted;
    net->num_under_way -= p->state == PEER_HERE;
    op->next = p->free;
    p->free = op;
}

/* ---- lost peers ----------------------------------------------------------------------------- */

/* Posted writes stay the provider's until it gives them back; nobody waits for that any more. */
static void lose_peer(struct epi_net *net, int peer, ep_status status, const char *why) {
    struct peer *p = &net->peer[peer];
    if (p->state != PEER_HERE) {
        return;
    }
    while (p->waiting) {
        end_op(net, p->waiting);
    }
    for (const struct epi_net_op *op = p->first; op; op = op->next) {
        net->num_under_way--;
    }
    p->state = PEER_LOST;
    p->status = status;
    net->num_untold++;
    epi_format(p->why, sizeof(p->why), "%s", why);
}

void epi_net_give_up(struct epi_net *net, int peer, ep_status status, const char *why) {
    if (peer >= 0 && peer < net->config.num_peers) {
        lose_peer(net, peer, status, why);
    }
}

static void check_deadlines(struct epi_net *net) {
    char why[EPI_NET_TEXT_BYTES];
    const int64_t now_ns = epi_ran_ns();
    for (int i = 0; i < net->config.num_peers && net->num_under_way > 0; i++) {
        struct peer *p = &net->peer[i];
        if (p->state != PEER_HERE || !p->first || p->first->deadline_ns > now_ns) {
            continue;
        }
        epi_format(why, sizeof(why),
                   "peer %d over %s: a write of %llu bytes %s within %.1f s (EP_TIMEOUT_MS)", i,
                   net->port->name, (unsigned long long)p->first->w.bytes,
                   p->first->is_posted ? "was not completed" : "was not taken by the NIC",
                   (double)net->config.timeout_ns / 1e9);
        lose_peer(net, i, EP_ERR_TIMEOUT, why);
    }
}

/* ---- writes --------------------------------------------------------------------------------- */

/* Posts what waits for a peer, until the NIC takes no more. */
static void post_waiting(struct epi_net *net, int peer) {
    struct peer *p = &net->peer[peer];
    char why[EPI_NET_TEXT_BYTES];
    while (p->waiting) {
        struct epi_net_op *op = p->waiting;
        const ep_status st = net->ops->write(net->port, op);
        if (st == EP_AGAIN) {
            return;
        }
        if (st != EP_OK) {
            epi_format(why, sizeof(why), "peer %d over %s: %s", peer, net->port->name,
                       epi_error_text());
            lose_peer(net, peer, st, why);
            return;
        }
        op->is_posted = true;
        net->num_waiting--;
        p->waiting = op->next;
    }
}

static bool outside(uint64_t offset, uint64_t bytes, uint64_t of) {
    return bytes > of || offset > of - bytes;
}

static ep_status check_write(const struct epi_net *net, const struct epi_net_write *w) {
    const struct epi_net_limits *limits = &net->port->limits;
    if (w->bytes == 0 || w->bytes > limits->max_write_bytes) {
        return epi_fail(EP_ERR_ARG, "a write of %llu bytes: %s takes 1 to %llu",
                        (unsigned long long)w->bytes, net->port->name,
                        (unsigned long long)limits->max_write_bytes);
    }
    if (!w->from || !w->from->handle || outside(w->from_offset, w->bytes, w->from->bytes)) {
        return epi_fail(EP_ERR_ARG, "a write of %llu bytes from %llu is not inside the region",
                        (unsigned long long)w->bytes, (unsigned long long)w->from_offset);
    }
    if (outside(w->to_offset, w->bytes, w->to.bytes)) {
        return epi_fail(EP_ERR_ARG,
                        "a write of %llu bytes to %llu is not inside the peer's region",
                        (unsigned long long)w->bytes, (unsigned long long)w->to_offset);
    }
    return EP_OK;
}

ep_status epi_net_write(struct epi_net *net, int peer, const struct epi_net_write *write) {
    if (peer < 0 || peer >= net->config.num_peers || net->peer[peer].state == PEER_ABSENT) {
        return epi_fail(EP_ERR_STATE, "peer %d was not added to this endpoint", peer);
    }
    struct peer *p = &net->peer[peer];
    if (p->state != PEER_HERE) {
        return epi_fail(p->status, "%s", p->why);
    }
    EPI_TRY(check_write(net, write));
    struct epi_net_op *op = p->free;
    if (!op) {
        return EP_AGAIN;
    }
    p->free = op->next;
    op->w = *write;
    op->is_posted = false;
    op->deadline_ns = epi_deadline_after(net->config.timeout_ns).at_ns;
    append_op(p, op);
    net->num_under_way++;
    net->num_waiting++;
    if (p->waiting == op) {
        post_waiting(net, peer);
    }
    return EP_OK;
}

/* ---- poll ----------------------------------------------------------------------------------- */

/* What has become of a posted write; false: nothing that is told. */
static bool take_end(struct epi_net *net, const struct epi_net_done *d,
                     struct epi_net_event *e) {
    struct epi_net_op *op = d->op;
    const int peer = op->peer;
    const bool told = net->peer[peer].state == PEER_HERE && d->status == EP_OK;
    char why[EPI_NET_TEXT_BYTES];
    *e = (struct epi_net_event){.kind = EPI_NET_SENT, .peer = peer, .token = op->w.token};
    end_op(net, op);
    if (d->status != EP_OK) {
        epi_format(why, sizeof(why), "peer %d over %s: %s", peer, net->port->name, d->why);
        lose_peer(net, peer, d->status, why);
    }
    return told;
}

static int tell_lost(struct epi_net *net, struct epi_net_event *events, int max) {
    int num = 0;
    for (int i = 0; i < net->config.num_peers && net->num_untold > 0 && num < max; i++) {
        struct peer *p = &net->peer[i];
        if (p->state == PEER_LOST) {
            p->state = PEER_TOLD;
            net->num_untold--;
            events[num++] = (struct epi_net_event){
                .kind = EPI_NET_LOST, .peer = i, .status = p->status, .why = p->why};
        }
    }
    return num;
}

int epi_net_poll(struct epi_net *net, struct epi_net_event *events, int max) {
    struct epi_net_done done[BATCH];
    int num = 0;
    while (num < max) {
        const int room = max - num < BATCH ? max - num : BATCH;
        const int n = net->ops->poll(net->port, done, room);
        for (int i = 0; i < n; i++) {
            struct epi_net_event *e = &events[num];
            if (!done[i].op) {
                *e = (struct epi_net_event){.kind = EPI_NET_ARRIVED, .data = done[i].data};
                num++;
            } else {
                num += take_end(net, &done[i], e);
            }
        }
        if (n < room) {
            break;
        }
    }
    for (int i = 0; i < net->config.num_peers && net->num_waiting > 0; i++) {
        post_waiting(net, i);
    }
    if (net->num_under_way > 0 && (num == 0 || ++net->num_polls % CLOCK_POLLS == 0)) {
        check_deadlines(net);
    }
    return num + tell_lost(net, events + num, max - num);
}

int epi_net_wait_fd(struct epi_net *net) {
    return net->num_untold > 0 ? -1 : net->ops->wait_fd(net->port);
}

int epi_net_under_way(const struct epi_net *net) {
    return net->num_under_way;
}

/* ---- peers and regions ---------------------------------------------------------------------- */

const char *epi_net_provider(const struct epi_net *net) {
    return net->port->name;
}

struct epi_net_limits epi_net_limits(const struct epi_net *net) {
    return net->port->limits;
}

size_t epi_net_address(const struct epi_net *net, void *out) {
    struct address_head head = {.magic = ADDRESS_MAGIC};
    head.bytes = (uint32_t)net->ops->address(net->port, (char *)out + sizeof(head),
                                             EPI_NET_ADDRESS_BYTES - sizeof(head));
    memcpy(head.provider, net->port->name, sizeof(head.provider));
    memcpy(out, &head, sizeof(head));
    return sizeof(head) + head.bytes;
}

ep_status epi_net_add_peer(struct epi_net *net, int peer, const void *address, size_t bytes) {
    struct address_head head;
    if (peer < 0 || peer >= net->config.num_peers || peer == net->config.self ||
        net->peer[peer].state != PEER_ABSENT) {
        return epi_fail(EP_ERR_ARG, "peer %d was added already, or is none of the %d others",
                        peer, net->config.num_peers - 1);
    }
    if (bytes > sizeof(head)) {
        memcpy(&head, address, sizeof(head));
    }
    if (bytes <= sizeof(head) || bytes > EPI_NET_ADDRESS_BYTES || head.magic != ADDRESS_MAGIC ||
        head.bytes != bytes - sizeof(head) || !memchr(head.provider, 0, 48)) {
        return epi_fail(EP_ERR_ARG, "what peer %d gave is no address of an endpoint", peer);
    }
    if (strcmp(head.provider, net->port->name) != 0) {
        return epi_fail(EP_ERR_MISMATCH,
                        "peer %d uses provider %s, this rank %s: set EP_NET_PROVIDER to one "
                        "that all have",
                        peer, head.provider, net->port->name);
    }
    EPI_TRY(
        net->ops->add_peer(net->port, peer, (const char *)address + sizeof(head), head.bytes));
    net->peer[peer].state = PEER_HERE;
    return EP_OK;
}

ep_status epi_net_register(struct epi_net *net, void *start, uint64_t bytes, int device,
                           struct epi_net_region *out) {
    struct epi_net_region r = {.start = start, .bytes = bytes, .device = device};
    if (!start || bytes == 0) {
        return epi_fail(EP_ERR_ARG, "a region of no memory cannot be registered");
    }
    if (device >= 0 && !net->port->limits.device_memory) {
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "%s takes no GPU memory here: what it sends must be staged in pinned "
                        "host memory",
                        net->port->name);
    }
    EPI_TRY(net->ops->add_region(net->port, &r));
    r.remote.bytes = bytes;
    *out = r;
    return EP_OK;
}

void epi_net_unregister(struct epi_net *net, struct epi_net_region *region) {
    if (region->handle) {
        net->ops->remove_region(net->port, region);
        *region = (struct epi_net_region){.device = -1};
    }
}

/* ---- life ----------------------------------------------------------------------------------- */

static ep_status open_port(struct epi_net *net) {
    net->ops = strncmp(net->config.provider ? net->config.provider : "", "fake", 4) == 0
                   ? &epi_net_fake
                   : &epi_net_fabric;
    return net->ops->open(&net->port, &net->config);
}

ep_status epi_net_open(struct epi_net **out, const struct epi_net_config *config) {
    struct epi_net_config c = *config;
    if (c.num_peers < 1 || c.num_peers > EPI_NET_MAX_PEERS || c.self < 0 ||
        c.self >= c.num_peers || c.max_in_flight < 0) {
        return epi_fail(EP_ERR_ARG, "endpoint %d of %d with %d writes in flight", c.self,
                        c.num_peers, c.max_in_flight);
    }
    c.max_in_flight = c.max_in_flight ? c.max_in_flight : DEFAULT_IN_FLIGHT;
    c.timeout_ns =
        c.timeout_ns ? c.timeout_ns : epi_opt_int(EPI_OPT_TIMEOUT_MS) * EPI_NS_PER_MS;
    c.provider = c.provider ? c.provider : epi_opt_str(EPI_OPT_NET_PROVIDER);
    c.interface = c.interface ? c.interface : epi_opt_str(EPI_OPT_NET_IFNAME);
    const size_t num_peers = (size_t)c.num_peers, num_each = (size_t)c.max_in_flight;
    struct epi_net *net = epi_alloc(sizeof(*net) + num_peers * sizeof(net->peer[0]));
    struct epi_net_op *op = epi_alloc_array(num_peers * num_each, sizeof(*op));
    ep_status st = EP_OK;
    if (!net || !op) {
        st = epi_fail(EP_ERR_NOMEM, "no memory for %zu writes in flight to each of %zu peers%s",
                      num_each, num_peers, epi_alloc_why());
    } else {
        net->config = c;
        net->op = op;
        for (size_t i = num_peers * num_each; i-- > 0;) {
            op[i].peer = (int)(i / num_each);
            op[i].next = net->peer[op[i].peer].free;
            net->peer[op[i].peer].free = &op[i];
        }
        st = open_port(net);
    }
    if (st != EP_OK) {
        epi_free(op);
        epi_free(net);
        return st;
    }
    *out = net;
    return EP_OK;
}

void epi_net_close(struct epi_net **net, struct epi_deadline deadline) {
    struct epi_net *n = *net;
    struct epi_net_event events[BATCH];
    *net = NULL;
    if (!n) {
        return;
    }
    while (n->num_under_way > 0 && !epi_deadline_expired(deadline)) {
        if (epi_net_poll(n, events, BATCH) == 0) {
            epi_sleep_ns(CLOSE_NAP_NS);
        }
    }
    n->ops->close(n->port);
    epi_free(n->op);
    epi_free(n);
}
