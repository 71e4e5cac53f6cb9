/* SPDX-License-Identifier: MIT */
/*
 * What src/net needs of libfabric's interface, so that it can be built where no header of it is and run
 * with any libfabric.so.1 from 1.17 on. Structs end where we stop reading: those that only
 * the library allocates may be longer. tests/t_net_layout.c compares with the header where there is one.
 * Nothing here runs.
 */
#ifndef EPI_NET_OFI_H
#define EPI_NET_OFI_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#define OFI_VERSION(major, minor) ((uint32_t)(major) << 16 | (minor))

/* Capabilities, and flags of operations and completions. */
#define OFI_MSG (1ull << 1)
#define OFI_RMA (1ull << 2)
#define OFI_WRITE (1ull << 9)
#define OFI_RECV (1ull << 10)
#define OFI_TRANSMIT (1ull << 11)
#define OFI_REMOTE_WRITE (1ull << 13)
#define OFI_REMOTE_CQ_DATA (1ull << 17)
#define OFI_HMEM (1ull << 47)
/* Modes: what the application has to do. */
#define OFI_CONTEXT (1ull << 59)
#define OFI_RX_CQ_DATA (1ull << 56)
#define OFI_CONTEXT2 (1ull << 52)

#define OFI_MR_LOCAL (1 << 2)
#define OFI_MR_VIRT_ADDR (1 << 4)
#define OFI_MR_ALLOCATED (1 << 5)
#define OFI_MR_PROV_KEY (1 << 6)
#define OFI_MR_ENDPOINT (1 << 9)
#define OFI_MR_HMEM (1 << 10)

enum { OFI_EP_RDM = 3 };
enum { OFI_PROGRESS_MANUAL = 2 };
enum { OFI_THREAD_DOMAIN = 3 };
enum { OFI_SOCKADDR_IN = 2 };
enum { OFI_CQ_FORMAT_DATA = 3 };
enum { OFI_WAIT_NONE = 0, OFI_WAIT_FD = 3 };
enum { OFI_GETWAIT = 5, OFI_ENABLE = 6 }; /* of control() */
enum { OFI_HMEM_CUDA = 1 };
enum { OFI_EAVAIL = 259 }; /* of read(): an operation failed; others are errno's */

struct ofi_ops;
struct ofi_domain;
struct ofi_av;
struct ofi_cq;
struct ofi_ep;
struct ofi_mr;

struct ofi_fid {
    size_t class;
    void *context;
    struct ofi_ops *ops;
};

struct ofi_ops {
    size_t size;
    int (*close)(struct ofi_fid *fid);
    int (*bind)(struct ofi_fid *fid, struct ofi_fid *to, uint64_t flags);
    int (*control)(struct ofi_fid *fid, int command, void *arg);
};

/* ---- what fi_getinfo tells ------------------------------------------------------------------ */

struct ofi_rx_attr {
    uint64_t caps, mode, op_flags, msg_order, comp_order;
    size_t total_buffered_recv, size, iov_limit;
};

struct ofi_ep_attr {
    int type;
    uint32_t protocol, protocol_version;
    size_t max_msg_size;
};

struct ofi_domain_attr {
    void *domain;
    char *name;
    int threading, control_progress, data_progress, resource_mgmt, av_type, mr_mode;
    size_t mr_key_size, cq_data_size;
};

struct ofi_fabric_attr {
    void *fabric;
    char *name, *prov_name;
    uint32_t prov_version, api_version;
};

struct ofi_info {
    struct ofi_info *next;
    uint64_t caps, mode;
    uint32_t addr_format;
    size_t src_addrlen, dest_addrlen;
    void *src_addr, *dest_addr, *handle;
    void *tx_attr;
    struct ofi_rx_attr *rx_attr;
    struct ofi_ep_attr *ep_attr;
    struct ofi_domain_attr *domain_attr;
    struct ofi_fabric_attr *fabric_attr;
};

/* ---- what is opened ------------------------------------------------------------------------- */

struct ofi_fabric {
    struct ofi_fid fid;
    struct {
        size_t size;
        int (*domain)(struct ofi_fabric *f, struct ofi_info *info, struct ofi_domain **out,
                      void *context);
        void *passive_ep, *eq_open, *wait_open;
        int (*trywait)(struct ofi_fabric *f, struct ofi_fid **fids, int count);
    } * ops;
};

struct ofi_av_attr {
    int type, rx_ctx_bits;
    size_t count, ep_per_node;
    const char *name;
    void *map_addr;
    uint64_t flags;
};

struct ofi_cq_attr {
    size_t size;
    uint64_t flags;
    int format, wait_obj, signaling_vector, wait_cond;
    void *wait_set;
};

struct ofi_mr_attr {
    const struct iovec *iov;
    size_t iov_count;
    uint64_t access, offset, requested_key;
    void *context;
    size_t auth_key_size;
    uint8_t *auth_key;
    int iface;
    union {
        uint64_t reserved;
        int cuda;
    } device;
    uint64_t later[8]; /* fields that later versions may look at: 0 */
};

struct ofi_domain {
    struct ofi_fid fid;
    struct {
        size_t size;
        int (*av_open)(struct ofi_domain *d, struct ofi_av_attr *attr, struct ofi_av **out,
                       void *context);
        int (*cq_open)(struct ofi_domain *d, struct ofi_cq_attr *attr, struct ofi_cq **out,
                       void *context);
        int (*endpoint)(struct ofi_domain *d, struct ofi_info *info, struct ofi_ep **out,
                        void *context);
    } * ops;
    struct {
        size_t size;
        void *reg, *regv;
        int (*regattr)(struct ofi_fid *fid, const struct ofi_mr_attr *attr, uint64_t flags,
                       struct ofi_mr **out);
    } * mr;
};

struct ofi_av {
    struct ofi_fid fid;
    struct {
        size_t size;
        int (*insert)(struct ofi_av *av, const void *addr, size_t count, uint64_t *out,
                      uint64_t flags, void *context);
    } * ops;
};

struct ofi_mr {
    struct ofi_fid fid;
    void *desc;
    uint64_t key;
};

struct ofi_cq_entry {
    void *context;
    uint64_t flags;
    size_t len;
    void *buf;
    uint64_t data;
};

struct ofi_cq_error {
    void *context;
    uint64_t flags;
    size_t len;
    void *buf;
    uint64_t data, tag;
    size_t olen;
    int err, prov_errno;
    void *err_data;
    size_t err_data_size;
    uint64_t later[8]; /* fields that later versions may write */
};

struct ofi_cq {
    struct ofi_fid fid;
    struct {
        size_t size;
        ssize_t (*read)(struct ofi_cq *cq, void *entries, size_t count);
        void *readfrom;
        ssize_t (*readerr)(struct ofi_cq *cq, struct ofi_cq_error *out, uint64_t flags);
        void *sread, *sreadfrom, *signal;
        const char *(*strerror)(struct ofi_cq *cq, int prov_errno, const void *err_data,
                                char *out, size_t bytes);
    } * ops;
};

struct ofi_ep {
    struct ofi_fid fid;
    void *ops;
    struct {
        size_t size;
        void *setname;
        int (*getname)(struct ofi_fid *fid, void *addr, size_t *bytes);
    } * cm;
    struct {
        size_t size;
        ssize_t (*recv)(struct ofi_ep *ep, void *buf, size_t bytes, void *desc, uint64_t from,
                        void *context);
    } * msg;
    struct {
        size_t size;
        void *read, *readv, *readmsg, *write, *writev, *writemsg, *inject;
        ssize_t (*writedata)(struct ofi_ep *ep, const void *buf, size_t bytes, void *desc,
                             uint64_t data, uint64_t to, uint64_t addr, uint64_t key,
                             void *context);
    } * rma;
};

/* X(field, symbol, result, arguments): what the library exports. */
#define OFI_SYMBOLS(X)                                                                         \
    X(getinfo, "fi_getinfo", int,                                                              \
      (uint32_t version, const char *node, const char *service, uint64_t flags,                \
       const struct ofi_info *hints, struct ofi_info **out))                                   \
    X(freeinfo, "fi_freeinfo", void, (struct ofi_info * info))                                 \
    X(dupinfo, "fi_dupinfo", struct ofi_info *, (const struct ofi_info *info))                 \
    X(fabric, "fi_fabric", int,                                                                \
      (struct ofi_fabric_attr * attr, struct ofi_fabric * *out, void *context))                \
    X(strerror, "fi_strerror", const char *, (int error))                                      \
    X(version, "fi_version", uint32_t, (void))

#endif
