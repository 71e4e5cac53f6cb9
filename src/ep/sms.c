/* SPDX-License-Identifier: MIT */
/*
 * SMs by the formula of docs/performance.md, which says how its numbers were measured.
 */
#include "src/ep/sms.h"

/* What one GPU sends to others, in GB/s, and what one SM of it does, of rows that go to several
 * peers, of rows that go to one, and of answers. From measurements of H200s; other generations by
 * the ratio of their links. */
#define NVLINK3_GBPS 230
#define NVLINK4_GBPS 344
#define NVLINK5_GBPS 700
#define PCIE_GBPS 50
#define SM_GBPS 43
#define SM_ONE_GBPS 35
#define SM_ANSWERS_GBPS 39
#define LONG_ROW 6144 /* below it a row costs more than its bytes, at most as twice as many */
/* SMs that receive, for one that sends; as many as rows that one becomes, within bounds. */
#define LEAST_RECEIVERS 2
#define MOST_RECEIVERS 4

/* Saturates the link with long rows. */
static int saturating(int link, int sm, int row_bytes) {
    const int sms = (link + sm - 1) / sm;
    return row_bytes >= LONG_ROW       ? sms
           : row_bytes <= LONG_ROW / 2 ? 2 * sms
                                       : (LONG_ROW * sms + row_bytes - 1) / row_bytes;
}

struct epi_sms epi_sms_for(int major, bool nvlink, int num_ranks, const struct epi_load *load) {
    const int link = !nvlink       ? PCIE_GBPS
                     : major >= 10 ? NVLINK5_GBPS
                     : major == 9  ? NVLINK4_GBPS
                                   : NVLINK3_GBPS;
    const int peers = num_ranks < 2                                  ? 1
                      : load->topk > 0 && load->topk < num_ranks - 1 ? load->topk
                                                                     : num_ranks - 1;
    const int send = saturating(link, peers > 1 ? SM_GBPS : SM_ONE_GBPS, load->row_bytes);
    const int rows = load->expanded ? load->topk : peers; /* that a token's row becomes */
    const int most = MOST_RECEIVERS * peers, least = LEAST_RECEIVERS * peers;
    const int receive = send * (rows < least ? least : rows > most ? most : rows);
    struct epi_sms s = {send, send + (receive + peers - 1) / peers};
    if (load->answers) {
        s.send = saturating(link, SM_ANSWERS_GBPS, load->row_bytes);
    }
    return s;
}
