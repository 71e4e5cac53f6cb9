/* SPDX-License-Identifier: MIT */
/*
 * Between fabric.c, which opens libfabric and chooses a provider, and fabric_port.c, which uses it.
 */
#ifndef EPI_NET_FABRIC_H
#define EPI_NET_FABRIC_H

#include "src/net/ofi.h"
#include "src/net/port.h"

struct epi_fabric_library {
#define OFI_FIELD(name, symbol, result, args) result(*name) args;
    OFI_SYMBOLS(OFI_FIELD)
#undef OFI_FIELD
};

extern struct epi_fabric_library epi_fabric; /* of the library that has been opened */

ep_status epi_fabric_open(void);
/* What to open, to be freed by epi_fabric.freeinfo. */
ep_status epi_fabric_choose(const struct epi_net_config *c, struct ofi_info **out);

#endif
