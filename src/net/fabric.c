/* SPDX-License-Identifier: MIT */
/*
 * libfabric: opened at run time, and which of its providers is used. Owns the library, which is opened
 * once per process and never closed (providers leave threads behind). Any thread; who opens at the same
 * time waits for the first.
 * Must not name a vendor but in the order of preference: what a provider can do, it says itself.
 */
#include "src/net/fabric.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ASKED_VERSION OFI_VERSION(1, 17)
#define MOST_FOUND 32

struct epi_fabric_library epi_fabric;

static pthread_mutex_t library_mutex = PTHREAD_MUTEX_INITIALIZER; /* guards what follows */
static bool library_is_open;

/* In order of preference; those with a reason, and those not named, only if EP_NET_PROVIDER does. */
static const struct {
    const char *name, *why_not;
} known[] = {
    {"cxi", NULL},
    {"efa", NULL},
    {"verbs;ofi_rxm", NULL},
    {"tcp", NULL},
    {"net", NULL}, /* what 1.16 and 1.17 call the tcp that has reliable datagrams itself */
    {"tcp;ofi_rxm", NULL},
    {"shm", "reaches this host alone, where ranks share memory without it"},
    {"sockets", "was given up by libfabric in favour of tcp"},
};
#define NUM_KNOWN ((int)(sizeof(known) / sizeof(known[0])))

static int preference(const char *provider) {
    int i = 0;
    while (i < NUM_KNOWN && strcmp(known[i].name, provider) != 0) {
        i++;
    }
    return i;
}

/* ---- the library ---------------------------------------------------------------------------- */

static ep_status open_library(void) {
    void *lib = dlopen("libfabric.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!lib) {
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "libfabric, which carries rows between nodes, cannot be loaded (%s): "
                        "install it (Debian: libfabric1)",
                        dlerror());
    }
#define LOAD(name, symbol, result, args) *(void **)&epi_fabric.name = dlsym(lib, symbol);
    OFI_SYMBOLS(LOAD)
#undef LOAD
#define CHECK(name, symbol, result, args)                                                      \
    if (!epi_fabric.name) {                                                                    \
        dlclose(lib);                                                                          \
        return epi_fail(EP_ERR_UNSUPPORTED, "libfabric.so.1 has no %s", symbol);               \
    }
    OFI_SYMBOLS(CHECK)
#undef CHECK
    const uint32_t version = epi_fabric.version();
    if (version < ASKED_VERSION) {
        dlclose(lib);
        return epi_fail(EP_ERR_UNSUPPORTED, "libfabric is of version %u.%u, 1.17 is needed",
                        version >> 16, version & 0xffff);
    }
    return EP_OK;
}

ep_status epi_fabric_open(void) {
    pthread_mutex_lock(&library_mutex);
    const ep_status st = library_is_open ? EP_OK : open_library();
    library_is_open = st == EP_OK;
    pthread_mutex_unlock(&library_mutex);
    return st;
}

/* ---- what there is -------------------------------------------------------------------------- */

/* What this library needs of a provider, NULL: of any; nothing is needed of those for `ep doctor`. */
static int ask(const char *provider, bool device_memory, struct ofi_info **out) {
    struct ofi_info *hints = epi_fabric.dupinfo(NULL);
    *out = NULL;
    if (!hints) {
        return -12; /* ENOMEM */
    }
    hints->caps = OFI_MSG | OFI_RMA | (device_memory ? OFI_HMEM : 0);
    hints->mode = OFI_CONTEXT | OFI_CONTEXT2 | OFI_RX_CQ_DATA;
    hints->ep_attr->type = OFI_EP_RDM;
    hints->domain_attr->mr_mode = OFI_MR_LOCAL | OFI_MR_VIRT_ADDR | OFI_MR_ALLOCATED |
                                  OFI_MR_PROV_KEY | OFI_MR_ENDPOINT |
                                  (device_memory ? OFI_MR_HMEM : 0);
    hints->domain_attr->threading = OFI_THREAD_DOMAIN;
    hints->domain_attr->data_progress = OFI_PROGRESS_MANUAL;
    hints->domain_attr->cq_data_size = sizeof(uint32_t);
    hints->fabric_attr->prov_name = strdup(provider); /* freed with the hints */
    const int rc = epi_fabric.getinfo(ASKED_VERSION, NULL, NULL, 0, hints, out);
    epi_fabric.freeinfo(hints);
    return rc;
}

/* The best of a provider's interfaces: that of the name, or one that leads off this host. A provider
 * that others are layered on answers for those, too. */
static const struct ofi_info *best_of(const struct ofi_info *list, const char *provider,
                                      const char *interface) {
    const struct ofi_info *best = NULL;
    int most = -1;
    for (const struct ofi_info *i = list; i; i = i->next) {
        const char *domain = i->domain_attr->name;
        const int score = 2 * (strcmp(domain, "lo") != 0) + (i->addr_format == OFI_SOCKADDR_IN);
        if (strcmp(i->fabric_attr->prov_name, provider) == 0 &&
            i->domain_attr->mr_key_size <= sizeof(uint64_t) &&
            (!interface || strcmp(interface, domain) == 0) && score > most) {
            best = i;
            most = score;
        }
    }
    return best;
}

/* The first thing that a provider lacks, of all that it has told about itself. */
static void explain_lack(const struct ofi_info *all, const char *provider, int rc,
                         const char *interface, char *why, size_t bytes) {
    bool reliable = false, writes = false, tells = false;
    for (const struct ofi_info *i = all; i; i = i->next) {
        if (strcmp(i->fabric_attr->prov_name, provider) == 0 &&
            i->ep_attr->type == OFI_EP_RDM) {
            reliable = true;
            writes |= (i->caps & OFI_RMA) != 0;
            tells |= i->domain_attr->cq_data_size >= sizeof(uint32_t);
        }
    }
    if (!reliable) {
        epi_format(why, bytes, "has no reliable datagram endpoints (FI_EP_RDM)");
    } else if (!writes) {
        epi_format(why, bytes, "cannot write to a peer's memory (FI_RMA)");
    } else if (!tells) {
        epi_format(why, bytes, "cannot tell 32 bits with a write (remote completion data)");
    } else if (rc != 0) {
        epi_format(why, bytes, "does not offer what is asked of it: %s",
                   epi_fabric.strerror(-rc));
    } else {
        epi_format(why, bytes, "has no interface %s (EP_NET_IFNAME)",
                   interface ? interface : "");
    }
}

/* Names of all providers, in order of preference. */
static int list_names(const struct ofi_info *all, struct epi_net_found *found, int max) {
    int num = 0;
    for (const struct ofi_info *i = all; i; i = i->next) {
        const char *name = i->fabric_attr->prov_name, *domain = i->domain_attr->name;
        int at = 0;
        while (at < num && strcmp(found[at].name, name) != 0) {
            at++;
        }
        if (at == num) {
            if (num == max || strlen(name) >= sizeof(found[0].name)) {
                continue;
            }
            for (at = num++; at > 0 && preference(found[at - 1].name) > preference(name);
                 at--) {
                found[at] = found[at - 1];
            }
            memset(&found[at], 0, sizeof(found[at]));
            strcpy(found[at].name, name);
        }
        const size_t used = strlen(found[at].domains);
        if (!strstr(found[at].domains, domain) &&
            used + strlen(domain) + 3 <= sizeof(found[at].domains)) {
            snprintf(found[at].domains + used, sizeof(found[at].domains) - used, "%s%s",
                     used ? ", " : "", domain);
        }
    }
    return num;
}

/*
 * Looks at all providers and says of each but one why it is not used; the chosen one's description in
 * *out, which may be NULL. Returns how many there are.
 */
static int look_at_all(const struct epi_net_config *c, struct epi_net_found *found, int max,
                       struct ofi_info **out) {
    struct ofi_info *all = NULL, *list = NULL;
    const int rc = epi_fabric.getinfo(ASKED_VERSION, NULL, NULL, 0, NULL, &all);
    if (rc != 0) {
        epi_fail(EP_ERR_UNSUPPORTED, "libfabric finds no provider: %s",
                 epi_fabric.strerror(-rc));
        return 0;
    }
    const int num = list_names(all, found, max);
    const char *taken = NULL;
    for (int i = 0; i < num; i++) {
        struct epi_net_found *f = &found[i];
        const int at = preference(f->name);
        int asked = ask(f->name, c->device_memory, &list);
        if (asked != 0 && c->device_memory) {
            asked = ask(f->name, false, &list); /* then rows are staged in host memory */
        }
        const struct ofi_info *best = best_of(list, f->name, c->interface);
        if (!best) {
            explain_lack(all, f->name, asked, c->interface, f->why, sizeof(f->why));
        } else if (c->provider && strcmp(c->provider, f->name) != 0) {
            epi_format(f->why, sizeof(f->why), "EP_NET_PROVIDER names %s", c->provider);
        } else if (!c->provider && at < NUM_KNOWN && known[at].why_not) {
            epi_format(f->why, sizeof(f->why), "%s", known[at].why_not);
        } else if (!c->provider && at == NUM_KNOWN) {
            epi_format(f->why, sizeof(f->why),
                       "was never tried here; EP_NET_PROVIDER='%s' takes it all the same",
                       f->name);
        } else if (taken) {
            epi_format(f->why, sizeof(f->why), "%s is preferred", taken);
        } else {
            taken = f->name;
            if (out) {
                *out = epi_fabric.dupinfo(best);
            }
        }
        if (list) {
            epi_fabric.freeinfo(list);
        }
    }
    epi_fabric.freeinfo(all);
    return num;
}

ep_status epi_fabric_choose(const struct epi_net_config *c, struct ofi_info **out) {
    struct epi_net_found found[MOST_FOUND];
    char text[EPI_ERROR_TEXT_BYTES / 2 + 128] = "";
    EPI_TRY(epi_fabric_open());
    *out = NULL;
    const int num = look_at_all(c, found, MOST_FOUND, out);
    if (*out) {
        return EP_OK;
    }
    bool is_there = false;
    for (int i = 0; i < num; i++) {
        const size_t used = strlen(text);
        const bool named = c->provider && strcmp(c->provider, found[i].name) == 0;
        is_there |= named;
        if (!c->provider || named) {
            epi_format(text + used, sizeof(text) - used, "; %s %s", found[i].name,
                       found[i].why);
        }
    }
    if (num > 0 && c->provider && !is_there) {
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "libfabric has no provider %s here (EP_NET_PROVIDER): see ep doctor",
                        c->provider);
    }
    return num == 0 ? EP_ERR_UNSUPPORTED
                    : epi_fail(EP_ERR_UNSUPPORTED,
                               "no provider of libfabric can carry rows between nodes%s", text);
}

int epi_net_find(struct epi_net_found *found, int max, char version[16]) {
    const struct epi_net_config c = {.provider = epi_opt_str(EPI_OPT_NET_PROVIDER),
                                     .interface = epi_opt_str(EPI_OPT_NET_IFNAME)};
    version[0] = '\0';
    if (epi_fabric_open() != EP_OK) {
        return 0;
    }
    const uint32_t v = epi_fabric.version();
    snprintf(version, 16, "%u.%u", v >> 16, v & 0xffff);
    return look_at_all(&c, found, max, NULL);
}
