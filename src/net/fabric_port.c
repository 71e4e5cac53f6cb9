/* SPDX-License-Identifier: MIT */
/*
 * An endpoint of libfabric: a reliable datagram endpoint (FI_EP_RDM) in a domain of its own, one
 * completion queue for what it sends and what arrives, writes that carry 32 bits of remote completion
 * data. Owns those, and the receives that some providers consume for each arrival. Runs on the
 * endpoint's thread (FI_THREAD_DOMAIN).
 *
 * libfabric says of a completion at the target that the bytes of that transfer may be read, and of no
 * other (fi_cq(3), target completion semantics); that is all that is relied on. GPU memory, FI_HMEM
 * and FI_RX_CQ_DATA are written by the manual and were never run: no such NIC was at hand.
 * Must not ask for completion levels or orders: net.h promises none.
 */
#include "src/net/fabric.h"

#include <errno.h>
#include <string.h>

#define MOST_RECEIVES 1024u
#define MOST_QUEUED 65536u
#define BATCH_ENTRIES 16

struct receive {
    void *scratch[8]; /* libfabric's, while it is posted */
};

struct fabric_port {
    struct epi_net_port port; /* first */
    struct ofi_info *info;
    struct ofi_fabric *fabric;
    struct ofi_domain *domain;
    struct ofi_av *av;
    struct ofi_cq *cq;
    struct ofi_ep *ep;
    int wait_fd; /* libfabric's; or -1: some providers have none */
    uint32_t num_receives,
        num_unposted; /* of them, those at the end of the array are unposted */
    struct receive **unposted;
    struct receive *receive;
    struct region *regions; /* all that are open */
    uint64_t to[];          /* [num_peers] libfabric's numbers of them */
};

struct region {
    struct ofi_mr *mr;
    struct region *next, **at;
};

static ep_status fabric_failed(const struct fabric_port *p, const char *call, long rc) {
    return epi_fail(rc == -ENOMEM ? EP_ERR_NOMEM : EP_ERR_SYSTEM, "%s: %s failed: %s",
                    p->port.name, call, epi_fabric.strerror((int)-rc));
}

#define CALL(p, name, call)                                                                    \
    do {                                                                                       \
        const long call_rc = (call);                                                           \
        if (call_rc != 0) {                                                                    \
            return fabric_failed(p, name, call_rc);                                            \
        }                                                                                      \
    } while (0)

/* ---- life ----------------------------------------------------------------------------------- */

static void close_fid(void *object) {
    struct ofi_fid *fid = object; /* every object begins with one */
    if (fid) {
        fid->ops->close(fid);
    }
}

static void remove_region(struct region *r) {
    close_fid(r->mr);
    *r->at = r->next;
    if (r->next) {
        r->next->at = r->at;
    }
    epi_free(r);
}

static void fabric_close(struct epi_net_port *port) {
    struct fabric_port *p = (struct fabric_port *)port;
    close_fid(p->ep);
    while (p->regions) {
        remove_region(p->regions);
    }
    close_fid(p->av);
    close_fid(p->cq);
    close_fid(p->domain);
    close_fid(p->fabric);
    if (p->info) {
        epi_fabric.freeinfo(p->info);
    }
    epi_free(p->receive);
    epi_free(p->unposted);
    epi_free(p);
}

/* Posts what arrivals have consumed; what does not fit now is posted by a later poll. */
static void post_receives(struct fabric_port *p) {
    while (p->num_unposted > 0 && p->ep->msg->recv(p->ep, NULL, 0, NULL, UINT64_MAX,
                                                   p->unposted[p->num_unposted - 1]) == 0) {
        p->num_unposted--;
    }
}

static ep_status make_receives(struct fabric_port *p) {
    const size_t most = p->info->rx_attr->size;
    p->num_receives = (uint32_t)(most < MOST_RECEIVES ? most : MOST_RECEIVES);
    p->receive = epi_alloc_array(p->num_receives, sizeof(p->receive[0]));
    p->unposted = epi_alloc_array(p->num_receives, sizeof(p->unposted[0]));
    if (!p->receive || !p->unposted) {
        return epi_fail(EP_ERR_NOMEM, "no memory for %u receives%s", p->num_receives,
                        epi_alloc_why());
    }
    for (p->num_unposted = 0; p->num_unposted < p->num_receives; p->num_unposted++) {
        p->unposted[p->num_unposted] = &p->receive[p->num_unposted];
    }
    post_receives(p);
    return EP_OK;
}

/* The tcp of 1.18, and net, from which it comes, leave the descriptor readable after the first arrival
 * (libfabric's issue 8947): who sleeps on it does not sleep. */
static bool wakes_for_nothing(const char *provider) {
    return strncmp(provider, "net", 3) == 0 ||
           (epi_fabric.version() == OFI_VERSION(1, 18) && strncmp(provider, "tcp", 3) == 0);
}

static ep_status open_endpoint(struct fabric_port *p, const struct epi_net_config *c) {
    struct ofi_av_attr av = {.count = (size_t)c->num_peers};
    struct ofi_cq_attr cq = {.format = OFI_CQ_FORMAT_DATA};
    const size_t wanted = 2 * (size_t)c->num_peers * (size_t)c->max_in_flight + MOST_RECEIVES;
    cq.size = wanted < MOST_QUEUED ? wanted : MOST_QUEUED;
    CALL(p, "fi_fabric", epi_fabric.fabric(p->info->fabric_attr, &p->fabric, NULL));
    CALL(p, "fi_domain", p->fabric->ops->domain(p->fabric, p->info, &p->domain, NULL));
    CALL(p, "fi_av_open", p->domain->ops->av_open(p->domain, &av, &p->av, NULL));
    cq.wait_obj = OFI_WAIT_FD;
    p->wait_fd = -1;
    if (p->domain->ops->cq_open(p->domain, &cq, &p->cq, NULL) != 0) {
        cq.wait_obj = OFI_WAIT_NONE;
        CALL(p, "fi_cq_open", p->domain->ops->cq_open(p->domain, &cq, &p->cq, NULL));
    } else if (wakes_for_nothing(p->port.name) ||
               p->cq->fid.ops->control(&p->cq->fid, OFI_GETWAIT, &p->wait_fd) != 0) {
        p->wait_fd = -1;
    }
    CALL(p, "fi_endpoint", p->domain->ops->endpoint(p->domain, p->info, &p->ep, NULL));
    struct ofi_fid *ep = &p->ep->fid;
    CALL(p, "fi_ep_bind", ep->ops->bind(ep, &p->av->fid, 0));
    CALL(p, "fi_ep_bind", ep->ops->bind(ep, &p->cq->fid, OFI_TRANSMIT | OFI_RECV));
    CALL(p, "fi_enable", ep->ops->control(ep, OFI_ENABLE, NULL));
    return p->info->mode & OFI_RX_CQ_DATA ? make_receives(p) : EP_OK;
}

static ep_status fabric_open(struct epi_net_port **out, const struct epi_net_config *c) {
    struct ofi_info *info = NULL;
    EPI_TRY(epi_fabric_choose(c, &info));
    struct fabric_port *p = epi_alloc(sizeof(*p) + (size_t)c->num_peers * sizeof(p->to[0]));
    if (!p) {
        epi_fabric.freeinfo(info);
        return epi_fail(EP_ERR_NOMEM, "no memory for an endpoint%s", epi_alloc_why());
    }
    p->info = info;
    p->port.ops = &epi_net_fabric;
    epi_format(p->port.name, sizeof(p->port.name), "%s", info->fabric_attr->prov_name);
    p->port.limits = (struct epi_net_limits){.max_write_bytes = info->ep_attr->max_msg_size,
                                             .device_memory = (info->caps & OFI_HMEM) != 0};
    const ep_status st = open_endpoint(p, c);
    if (st != EP_OK) {
        fabric_close(&p->port);
        return st;
    }
    *out = &p->port;
    return EP_OK;
}

/* ---- peers and regions ---------------------------------------------------------------------- */

static size_t fabric_address(struct epi_net_port *port, void *out, size_t room) {
    struct fabric_port *p = (struct fabric_port *)port;
    size_t bytes = room;
    const int rc = p->ep->cm->getname(&p->ep->fid, out, &bytes);
    if (rc != 0 || bytes > room) {
        fabric_failed(p, "fi_getname", rc ? rc : -ENOSPC);
        return 0;
    }
    return bytes;
}

static ep_status fabric_add_peer(struct epi_net_port *port, int peer, const void *address,
                                 size_t bytes) {
    struct fabric_port *p = (struct fabric_port *)port;
    char copy[EPI_NET_ADDRESS_BYTES] = {0};
    memcpy(copy, address, bytes);
    const int rc = p->av->ops->insert(p->av, copy, 1, &p->to[peer], 0, NULL);
    if (rc != 1) {
        return epi_fail(EP_ERR_ARG, "%s does not take peer %d's address: %s", p->port.name,
                        peer, rc < 0 ? epi_fabric.strerror(-rc) : "it is none of its own");
    }
    return EP_OK;
}

static ep_status register_memory(struct fabric_port *p, struct epi_net_region *region,
                                 struct ofi_mr **out) {
    const struct iovec iov = {region->start, region->bytes};
    const int mode = p->info->domain_attr->mr_mode;
    struct ofi_mr_attr attr = {
        .iov = &iov, .iov_count = 1, .access = OFI_WRITE | OFI_REMOTE_WRITE};
    if (region->device >= 0) {
        attr.iface = OFI_HMEM_CUDA;
        attr.device.cuda = region->device;
    }
    if (!(mode & OFI_MR_PROV_KEY)) {
        /* libfabric's listener asks nobody who he is: a key that cannot be guessed is what keeps
         * strangers from this memory. */
        if (!epi_random(&attr.requested_key, p->info->domain_attr->mr_key_size)) {
            return epi_fail(EP_ERR_SYSTEM, "no random bytes for a memory key: %s",
                            strerror(errno));
        }
    }
    int rc = p->domain->mr->regattr(&p->domain->fid, &attr, 0, out);
    if (rc == 0 && (mode & OFI_MR_ENDPOINT)) {
        struct ofi_fid *mr = &(*out)->fid;
        rc = mr->ops->bind(mr, &p->ep->fid, 0);
        rc = rc ? rc : mr->ops->control(mr, OFI_ENABLE, NULL);
    }
    if (rc != 0) {
        close_fid(*out);
        return epi_fail(rc == -ENOSPC || rc == -ENOMEM ? EP_ERR_CAPACITY : EP_ERR_SYSTEM,
                        "%s cannot register %llu bytes of %s memory: %s (ulimit -l?)",
                        p->port.name, (unsigned long long)region->bytes,
                        region->device >= 0 ? "GPU" : "host", epi_fabric.strerror(-rc));
    }
    return EP_OK;
}

static ep_status fabric_add_region(struct epi_net_port *port, struct epi_net_region *region) {
    struct fabric_port *p = (struct fabric_port *)port;
    struct region *r = epi_alloc(sizeof(*r));
    if (!r) {
        return epi_fail(EP_ERR_NOMEM, "no memory for a region%s", epi_alloc_why());
    }
    const ep_status st = register_memory(p, region, &r->mr);
    if (st != EP_OK) {
        epi_free(r);
        return st;
    }
    r->next = p->regions;
    r->at = &p->regions;
    if (r->next) {
        r->next->at = &r->next;
    }
    p->regions = r;
    region->handle = r;
    region->remote.key = r->mr->key;
    if (p->info->domain_attr->mr_mode & OFI_MR_VIRT_ADDR) {
        region->remote.base = (uint64_t)(uintptr_t)region->start;
    }
    return EP_OK;
}

static void fabric_remove_region(struct epi_net_port *port, struct epi_net_region *region) {
    (void)port;
    remove_region(region->handle);
}

/* ---- writes --------------------------------------------------------------------------------- */

static ep_status fabric_write(struct epi_net_port *port, struct epi_net_op *op) {
    struct fabric_port *p = (struct fabric_port *)port;
    const struct epi_net_write *w = &op->w;
    const struct region *r = w->from->handle;
    const ssize_t rc = p->ep->rma->writedata(
        p->ep, (const char *)w->from->start + w->from_offset, w->bytes, r->mr->desc, w->data,
        p->to[op->peer], w->to.base + w->to_offset, w->to.key, op);
    if (rc == -EAGAIN) {
        return EP_AGAIN;
    }
    return rc == 0 ? EP_OK
                   : epi_fail(EP_ERR_PEER, "a write of %llu bytes was refused: %s",
                              (unsigned long long)w->bytes, epi_fabric.strerror((int)-rc));
}

/* Gives a receive back that an arrival has consumed. */
static bool take_receive(struct fabric_port *p, void *context) {
    struct receive *r = context;
    const bool is_one = p->receive && r >= p->receive && r < p->receive + p->num_receives;
    if (is_one) {
        p->unposted[p->num_unposted++] = r;
    }
    return is_one;
}

/* An operation that went wrong: 1. 0: it was somebody's write here, who is told himself. -1: none. */
static int take_error(struct fabric_port *p, struct epi_net_done *done) {
    struct ofi_cq_error e = {0};
    char text[128] = "";
    if (p->cq->ops->readerr(p->cq, &e, 0) <= 0) {
        return -1;
    }
    if (take_receive(p, e.context) || !e.context) {
        return 0;
    }
    const char *more =
        p->cq->ops->strerror(p->cq, e.prov_errno, e.err_data, text, sizeof(text));
    *done = (struct epi_net_done){.op = e.context, .status = EP_ERR_PEER};
    epi_format(done->why, sizeof(done->why), "a write failed: %s (%s)",
               epi_fabric.strerror(e.err), more ? more : "");
    return 1;
}

static int fabric_poll(struct epi_net_port *port, struct epi_net_done *done, int max) {
    struct fabric_port *p = (struct fabric_port *)port;
    struct ofi_cq_entry entry[BATCH_ENTRIES];
    int num = 0, failed = 0;
    while (num < max && failed >= 0) {
        const int room = max - num < BATCH_ENTRIES ? max - num : BATCH_ENTRIES;
        const ssize_t n = p->cq->ops->read(p->cq, entry, (size_t)room);
        if (n == -OFI_EAVAIL) {
            failed = take_error(p, &done[num]);
            num += failed > 0;
            continue;
        }
        for (int i = 0; i < n; i++) {
            const struct ofi_cq_entry *e = &entry[i];
            if (e->flags & OFI_WRITE) {
                done[num++] = (struct epi_net_done){.op = e->context, .status = EP_OK};
                continue;
            }
            take_receive(p, e->context);
            if (e->flags & OFI_REMOTE_CQ_DATA) {
                done[num++] = (struct epi_net_done){.data = (uint32_t)e->data};
            }
        }
        if (n < room) {
            break;
        }
    }
    post_receives(p);
    return num;
}

static int fabric_wait_fd(struct epi_net_port *port) {
    struct fabric_port *p = (struct fabric_port *)port;
    struct ofi_fid *fid = &p->cq->fid;
    return p->wait_fd >= 0 && p->fabric->ops->trywait(p->fabric, &fid, 1) == 0 ? p->wait_fd
                                                                               : -1;
}

const struct epi_net_ops epi_net_fabric = {.size = sizeof(struct epi_net_ops),
                                           .open = fabric_open,
                                           .address = fabric_address,
                                           .add_peer = fabric_add_peer,
                                           .add_region = fabric_add_region,
                                           .remove_region = fabric_remove_region,
                                           .write = fabric_write,
                                           .poll = fabric_poll,
                                           .wait_fd = fabric_wait_fd,
                                           .close = fabric_close};
