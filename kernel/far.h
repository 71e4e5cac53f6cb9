/* SPDX-License-Identifier: MIT */
/*
 * Between nodes: who is near, streams of packets, and control messages. Function bodies for dispatch and
 * combine; written in the kernel language. Compiled for GPUs only with K_NODES.
 *
 * A relay acts for the ranks of other nodes: it stores their words and rows at the ranks of its node, to
 * the places to which they would. So nobody that receives can tell who is near.
 */
#ifndef KERNEL_FAR_H
#define KERNEL_FAR_H

#include "kernel/op.h"
#include "kernel/put.h"

#if defined(__CUDACC__) && !defined(K_NODES)
#define K_HAS_FAR(a) 0
#else
#define K_HAS_FAR(a) ((a)->far != 0)
#endif

static K_INLINE k_bool is_near(const struct k_far *f, k_i32 rank) {
    return f->node[rank] == f->own;
}

static K_INLINE k_i32 node_ranks(const struct k_far *f, k_i32 node) {
    return f->first[node + 1] - f->first[node];
}

/* The rank of this node with index l. */
static K_INLINE k_i32 near_rank(const struct k_far *f, k_i32 l) {
    return f->ranks[f->first[f->own] + l];
}

/* Rank number i for one that waits for all: those of its node first, so that a relay that is late is
 * named, not those for whom it acts. */
static K_INLINE k_i32 far_order(const struct k_far *f, k_i32 i, k_i32 ranks) {
    return f->ranks[(f->first[f->own] + i) % ranks];
}

/* ---- streams -------------------------------------------------------------------------------- */

#define K_STREAM_OUT 0
#define K_STREAM_IN 1

static K_INLINE struct k_stream *far_stream(const struct k_far *f, k_i32 partner, k_i32 lane,
                                            k_i32 way) {
    return &f->stream[(partner * (f->map.lanes + 1) + lane) * 2 + way];
}

/*
 * Where number n of a stream lies in the memory of the rank whose partner number `partner` it is with.
 *
 *          +------------------+------------------+--------------+--------------+---------+
 *   block  | out              | in               | control out  | control in   | credits |
 *          | [lanes][slots]   | [lanes][slots]   | [slots]      | [slots]      | 2 x 16  |
 *          +------------------+------------------+--------------+--------------+---------+
 */
static K_INLINE k_u64 far_slot(const struct k_far *f, k_i32 partner, k_u32 kind, k_i32 lane,
                               k_i32 way, k_u32 n) {
    const struct k_far_map *m = &f->map;
    const k_u64 slot = n & (k_u32)(m->slots - 1), lanes = (k_u64)m->lanes * (k_u64)m->slots;
    const k_u64 packets = lanes * (k_u64)m->packet_bytes;
    const k_u64 messages = (k_u64)m->slots * (k_u64)m->control_bytes;
    k_u64 at = (k_u64)partner * m->block_bytes;
    if (kind == K_PUT_PACKET) {
        at += (k_u64)way * packets +
              ((k_u64)lane * (k_u64)m->slots + slot) * (k_u64)m->packet_bytes;
    } else {
        at += 2 * packets;
        at += kind == K_PUT_CONTROL ? (k_u64)way * messages + slot * (k_u64)m->control_bytes
                                    : 2 * messages + 16ull * (k_u64)way;
    }
    return at;
}

/* The word of what has been put, in `sent` or `arrived`. */
static K_INLINE const k_u64 *far_word(const struct k_far *f, k_u64 table, k_i32 partner,
                                      k_u32 kind, k_i32 lane, k_u32 n) {
    const k_u32 what = K_PUT_WHAT(f->partner[partner].rank, lane, kind, n);
    return (const k_u64 *)(table + 8 * K_PUT_WORD(&f->net, what));
}

static K_INLINE k_u32 far_tag(k_u32 n) {
    return K_PUT_NUMBER(n) + 1u;
}

/* Whether number n of the table has passed; all lanes call. */
static K_INLINE k_bool far_passed(struct k_thread *k, const struct k_far *f, k_u64 table,
                                  k_i32 partner, k_u32 kind, k_i32 lane, k_u32 n) {
    return k_arrived(k, far_word(f, table, partner, kind, lane, n), far_tag(n), 0);
}

/* Whether number n, which is to be put next, has a slot here and there. */
static K_INLINE k_bool far_has_slot(struct k_thread *k, const struct k_far *f, k_i32 partner,
                                    k_u32 kind, k_i32 lane, k_u32 n) {
    const k_u32 before = n - (k_u32)f->map.slots;
    return n < (k_u32)f->map.slots ||
           (far_passed(k, f, f->net.sent, partner, kind, lane, before) &&
            (kind != K_PUT_PACKET ||
             far_passed(k, f, f->net.arrived, partner, K_PUT_CREDIT, lane, before)));
}

/* Whether the stream's next packet is here, and can be given back. */
static K_INLINE k_bool far_has_packet(struct k_thread *k, const struct k_far *f, k_i32 partner,
                                      k_i32 lane, k_u32 n) {
    return far_passed(k, f, f->net.arrived, partner, K_PUT_PACKET, lane, n) &&
           far_has_slot(k, f, partner, K_PUT_CREDIT, lane, n);
}

/* The warp has settled `bytes` bytes of number n: they go to the partner. */
static K_INLINE void far_put(struct k_thread *k, const struct k_far *f, k_i32 partner,
                             k_u32 kind, k_i32 lane, k_u32 n, k_u64 bytes) {
    const struct k_partner *p = &f->partner[partner];
    k_syncwarp(k);
    if (k->lane == 0) {
        k_put(&f->net, K_PUT_WHAT(p->rank, lane, kind, n),
              far_slot(f, partner, kind, lane, K_STREAM_OUT, n),
              far_slot(f, p->theirs, kind, lane, K_STREAM_IN, n), bytes);
    }
}

/* Packet n of a stream has been taken out of its slot. */
static K_INLINE void far_give_back(struct k_thread *k, const struct k_far *f, k_i32 partner,
                                   k_i32 lane, k_u32 n) {
    far_put(k, f, partner, K_PUT_CREDIT, lane, n, 16);
}

static K_INLINE void set_stream(struct k_thread *k, struct k_stream *s, struct k_stream to) {
    k_syncwarp(k);
    if (k->lane == 0) {
        *s = to;
    }
    k_syncwarp(k);
}

/* ---- packets -------------------------------------------------------------------------------- */

/* How records of so many bytes are cut into packets with `wide` words for each row. */
struct packing {
    k_i32 wide, record;
    k_i32 rows; /* of a packet; 0: records come in parts ... */
    k_i32 room; /* ... of so many bytes */
};

static K_INLINE k_i32 table_bytes(k_i32 wide, k_i32 rows) {
    return (4 * (K_FAR_HEAD + wide + rows * (K_FAR_ENTRY + wide)) + 15) / 16 * 16;
}

static K_INLINE struct packing packing_of(const struct k_far *f, k_i32 wide, k_i32 record) {
    const k_i32 room = f->map.packet_bytes - 15 - 4 * (K_FAR_HEAD + wide);
    struct packing p = {wide, record, 0, 0};
    p.rows = room / (record + 4 * (K_FAR_ENTRY + wide));
    p.room = (f->map.packet_bytes - table_bytes(wide, 1)) & ~15;
    return p;
}

static K_INLINE k_u32 *entry_at(k_u32 *packet, k_i32 wide, k_i32 row) {
    return packet + K_FAR_HEAD + wide + row * (K_FAR_ENTRY + wide);
}

/* A packet of this operation begins with it (abi_far.h). */
static K_INLINE void write_head(struct k_thread *k, k_u32 *packet, k_i32 rows, k_bool last,
                                k_i32 from, k_i32 bytes, k_i32 place) {
    if (k->lane == 0) {
        packet[K_FAR_ROWS] = (k_u32)rows;
        packet[K_FAR_LAST] = last;
        packet[K_FAR_FROM] = (k_u32)from;
        packet[K_FAR_BYTES] = (k_u32)bytes;
        packet[K_FAR_PLACE] = (k_u32)place;
    }
}

/* `bytes` bytes, a multiple of 16, to a place for each lane, by way of the mover's stages. */
static K_FN void move_bytes(struct k_thread *k, struct k_mover *m, k_i32 stages,
                            k_i32 stage_bytes, const void *from, k_i32 bytes,
                            struct k_peer to) {
    k_i32 stage = 0;
    for (k_i32 at = 0; at < bytes; at += stage_bytes) {
        const k_i32 n = k_min(bytes - at, stage_bytes);
        const struct k_peer here = k_is_nowhere(to) ? to : k_peer_plus(to, (k_u64)at);
        k_mover_retire(k, m, newest_stores(stages));
        k_mover_load(k, m, stage, (const k_u8 *)from + at, n);
        k_mover_wait(k, m, stage);
        k_mover_store(k, m, stage, here, n);
        k_mover_commit(k, m);
        stage = next_stage(stage, stages);
    }
    k_mover_retire(k, m, 0);
}

/* ---- the loop of what is far ----------------------------------------------------------------- */

/* What a look at a stream comes to. */
#define K_FAR_WAITS 0
#define K_FAR_MOVED 1
#define K_FAR_OVER 2

/* What a waiting warp says it waits for: the first stream that is not over. */
struct far_blame {
    k_i32 rank, phase;
};

/* ---- control -------------------------------------------------------------------------------- */

/* The warp waits until the next control message to the partner has a slot; NULL after a fault. */
static K_FN k_u32 *begin_message(struct k_thread *k, const struct k_far *f, k_i32 partner) {
    const k_u32 n = far_stream(f, partner, f->map.lanes, K_STREAM_OUT)->next;
    const k_u32 before = n - (k_u32)f->map.slots;
    k_u32 value = 0;
    if (n >= (k_u32)f->map.slots &&
        !k_await(k, far_word(f, f->net.sent, partner, K_PUT_CONTROL, 0, before),
                 far_tag(before), f->partner[partner].rank, K_PHASE_READY, &value)) {
        return 0;
    }
    return (k_u32 *)(f->staging + far_slot(f, partner, K_PUT_CONTROL, 0, K_STREAM_OUT, n));
}

static K_INLINE void end_message(struct k_thread *k, const struct k_far *f, k_i32 partner,
                                 k_i32 words) {
    struct k_stream *s = far_stream(f, partner, f->map.lanes, K_STREAM_OUT);
    far_put(k, f, partner, K_PUT_CONTROL, 0, s->next, 4ull * (k_u64)words);
    k_syncwarp(k);
    if (k->lane == 0) {
        s->next++;
    }
    k_syncwarp(k);
}

/* The next control message of a partner; NULL after a fault. */
static K_FN const k_u32 *await_message(struct k_thread *k, const struct k_far *f, k_i32 partner,
                                       k_i32 phase) {
    struct k_stream *s = far_stream(f, partner, f->map.lanes, K_STREAM_IN);
    const k_u32 n = s->next;
    k_u32 value = 0;
    if (!k_await(k, far_word(f, f->net.arrived, partner, K_PUT_CONTROL, 0, n), far_tag(n),
                 f->partner[partner].rank, phase, &value)) {
        return 0;
    }
    k_syncwarp(k);
    if (k->lane == 0) {
        s->next = n + 1;
    }
    k_syncwarp(k);
    return (const k_u32 *)(f->staging + far_slot(f, partner, K_PUT_CONTROL, 0, K_STREAM_IN, n));
}

/*
 * One warp: this rank's ready message to its relays. The last word is `where`, or, of a combine, the row
 * at the relay where the answers of each rank of the node land: behind those of the lower ones.
 */
static K_FN k_bool post_far_ready(struct k_thread *k, const struct k_far *f,
                                  const struct op_signature *sig, k_u32 where,
                                  const k_u32 *send_count) {
    for (k_i32 d = 0; d < f->nodes; d++) {
        if (d == f->own) {
            continue;
        }
        k_u32 *to = begin_message(k, f, f->to_node[d]);
        if (!to) {
            return 0;
        }
        const k_i32 ranks = node_ranks(f, d);
        for (k_i32 i = k->lane; i < K_FAR_READY_WORDS; i += K_LANES) {
            to[i] = signature_word(sig, i);
        }
        for (k_i32 l = k->lane; l < ranks; l += K_LANES) {
            k_u32 at = where;
            for (k_i32 i = 0; send_count && i < l; i++) {
                at += send_count[f->ranks[f->first[d] + i]];
            }
            to[K_FAR_READY_WORDS + l] = at;
        }
        end_message(k, f, f->to_node[d], K_FAR_READY_WORDS + ranks);
    }
    return 1;
}

/* The words of a source's ready message, at the ranks of its relay's node. Its word 0. */
static K_INLINE k_u32 relay_ready(struct k_thread *k, const struct k_far *f, k_i32 i,
                                  const k_u32 *words) {
    const struct k_group *g = k->g;
    const k_i32 source = f->partner[f->from_source[i]].rank, ranks = node_ranks(f, f->own);
    for (k_i32 l = k->lane; l < ranks; l += K_LANES) {
        const k_u32 where = words[K_FAR_READY_WORDS + l];
        f->where[i * f->map.most_near + l] = where;
        k_publish_four(k_peer_at(g, near_rank(f, l), ready_offset(g, k->epoch, source)),
                       K_WORD(k->epoch, words[0]), K_WORD(k->epoch, words[1]),
                       K_WORD(k->epoch, words[2]), K_WORD(k->epoch, where));
    }
    return words[0];
}

#endif
