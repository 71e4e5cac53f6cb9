/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * What src/net/ofi.h says of libfabric's structs and constants is what its header says, where that is
 * installed (Debian: libfabric-dev).
 */
#include "src/net/ofi.h"
#include "tests/tap.h"

#if __has_include(<rdma/fi_rma.h>)
#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

static int num_wrong;

static void compare(const char *what, unsigned long long ours, unsigned long long theirs) {
    if (ours != theirs) {
        num_wrong++;
        diag("%s: %llx, the header says %llx", what, ours, theirs);
    }
}

#define FIELD(us, them, our, their)                                                            \
    compare(#them "." #their, offsetof(struct us, our), offsetof(struct them, their));         \
    compare(#them "." #their ", bytes", sizeof(((struct us *)0)->our),                         \
            sizeof(((struct them *)0)->their))
#define SAME(us, them, name) FIELD(us, them, name, name)
#define VALUE(name) compare("FI_" #name, OFI_##name, FI_##name)
/* Of a table of functions: its place in an object, and a function's place in it. */
#define TABLE(us, them, table, ops, name)                                                      \
    FIELD(us, them, table, table);                                                             \
    compare(                                                                                   \
        #ops "." #name,                                                                        \
        (size_t)((char *)&((struct us *)0)->table->name - (char *)((struct us *)0)->table),    \
        offsetof(struct ops, name))

static void compare_values(void) {
    VALUE(MSG), VALUE(RMA), VALUE(WRITE), VALUE(RECV), VALUE(TRANSMIT), VALUE(REMOTE_WRITE);
    VALUE(REMOTE_CQ_DATA), VALUE(HMEM), VALUE(CONTEXT), VALUE(RX_CQ_DATA), VALUE(CONTEXT2);
    VALUE(MR_LOCAL), VALUE(MR_VIRT_ADDR), VALUE(MR_ALLOCATED), VALUE(MR_PROV_KEY);
    VALUE(MR_ENDPOINT), VALUE(MR_HMEM), VALUE(EP_RDM), VALUE(PROGRESS_MANUAL);
    VALUE(THREAD_DOMAIN), VALUE(SOCKADDR_IN), VALUE(CQ_FORMAT_DATA), VALUE(ENABLE);
    VALUE(HMEM_CUDA), VALUE(EAVAIL), VALUE(WAIT_NONE), VALUE(WAIT_FD), VALUE(GETWAIT);
    compare("FI_VERSION", OFI_VERSION(1, 17), FI_VERSION(1, 17));
    compare("FI_ADDR_UNSPEC", UINT64_MAX, FI_ADDR_UNSPEC);
    compare("struct fi_context2", sizeof(void *[8]), sizeof(struct fi_context2));
}

static void compare_structs(void) {
    FIELD(ofi_fid, fid, class, fclass);
    SAME(ofi_fid, fid, ops);
    SAME(ofi_ops, fi_ops, close), SAME(ofi_ops, fi_ops, bind), SAME(ofi_ops, fi_ops, control);
    SAME(ofi_rx_attr, fi_rx_attr, mode), SAME(ofi_rx_attr, fi_rx_attr, size);
    SAME(ofi_ep_attr, fi_ep_attr, type), SAME(ofi_ep_attr, fi_ep_attr, max_msg_size);
    SAME(ofi_domain_attr, fi_domain_attr, name),
        SAME(ofi_domain_attr, fi_domain_attr, threading);
    SAME(ofi_domain_attr, fi_domain_attr, data_progress);
    SAME(ofi_domain_attr, fi_domain_attr, mr_mode);
    SAME(ofi_domain_attr, fi_domain_attr, mr_key_size);
    SAME(ofi_domain_attr, fi_domain_attr, cq_data_size);
    SAME(ofi_fabric_attr, fi_fabric_attr, prov_name);
    SAME(ofi_info, fi_info, next), SAME(ofi_info, fi_info, caps), SAME(ofi_info, fi_info, mode);
    SAME(ofi_info, fi_info, addr_format), SAME(ofi_info, fi_info, rx_attr);
    SAME(ofi_info, fi_info, ep_attr), SAME(ofi_info, fi_info, domain_attr);
    SAME(ofi_info, fi_info, fabric_attr);
    SAME(ofi_av_attr, fi_av_attr, type), SAME(ofi_av_attr, fi_av_attr, count);
    compare("struct fi_av_attr", sizeof(struct ofi_av_attr), sizeof(struct fi_av_attr));
    SAME(ofi_cq_attr, fi_cq_attr, size), SAME(ofi_cq_attr, fi_cq_attr, format);
    compare("struct fi_cq_attr", sizeof(struct ofi_cq_attr), sizeof(struct fi_cq_attr));
    FIELD(ofi_mr_attr, fi_mr_attr, iov, mr_iov);
    SAME(ofi_mr_attr, fi_mr_attr, iov_count), SAME(ofi_mr_attr, fi_mr_attr, access);
    SAME(ofi_mr_attr, fi_mr_attr, requested_key), SAME(ofi_mr_attr, fi_mr_attr, iface);
    SAME(ofi_mr_attr, fi_mr_attr, device);
    ok(sizeof(struct ofi_mr_attr) >= sizeof(struct fi_mr_attr), "room in fi_mr_attr");
    FIELD(ofi_mr, fid_mr, desc, mem_desc);
    SAME(ofi_mr, fid_mr, key);
    FIELD(ofi_cq_entry, fi_cq_data_entry, context, op_context);
    SAME(ofi_cq_entry, fi_cq_data_entry, flags), SAME(ofi_cq_entry, fi_cq_data_entry, data);
    compare("struct fi_cq_data_entry", sizeof(struct ofi_cq_entry),
            sizeof(struct fi_cq_data_entry));
    FIELD(ofi_cq_error, fi_cq_err_entry, context, op_context);
    SAME(ofi_cq_error, fi_cq_err_entry, err), SAME(ofi_cq_error, fi_cq_err_entry, prov_errno);
    SAME(ofi_cq_error, fi_cq_err_entry, err_data);
    SAME(ofi_cq_error, fi_cq_err_entry, err_data_size);
    ok(sizeof(struct ofi_cq_error) >= sizeof(struct fi_cq_err_entry),
       "room in fi_cq_err_entry");
}

static void compare_functions(void) {
    TABLE(ofi_fabric, fid_fabric, ops, fi_ops_fabric, domain);
    TABLE(ofi_fabric, fid_fabric, ops, fi_ops_fabric, trywait);
    TABLE(ofi_domain, fid_domain, ops, fi_ops_domain, av_open);
    TABLE(ofi_domain, fid_domain, ops, fi_ops_domain, cq_open);
    TABLE(ofi_domain, fid_domain, ops, fi_ops_domain, endpoint);
    TABLE(ofi_domain, fid_domain, mr, fi_ops_mr, regattr);
    TABLE(ofi_av, fid_av, ops, fi_ops_av, insert);
    TABLE(ofi_cq, fid_cq, ops, fi_ops_cq, read);
    TABLE(ofi_cq, fid_cq, ops, fi_ops_cq, readerr);
    TABLE(ofi_cq, fid_cq, ops, fi_ops_cq, strerror);
    TABLE(ofi_ep, fid_ep, cm, fi_ops_cm, getname);
    TABLE(ofi_ep, fid_ep, msg, fi_ops_msg, recv);
    TABLE(ofi_ep, fid_ep, rma, fi_ops_rma, writedata);
}

int main(void) {
    compare_values();
    compare_structs();
    compare_functions();
    ok(num_wrong == 0, "libfabric %d.%d has these structs and constants", FI_MAJOR_VERSION,
       FI_MINOR_VERSION);
    return done_testing();
}
#else
int main(void) {
    skip_all("libfabric's header is not installed (Debian: libfabric-dev)");
}
#endif
