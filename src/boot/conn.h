/* SPDX-License-Identifier: MIT */
/*
 * One connection that carries frames, not blocking in either direction. See conn.c.
 */
#ifndef EPI_BOOT_CONN_H
#define EPI_BOOT_CONN_H

#include "src/base/base.h"
#include "src/boot/wire.h"

/* An encoded frame, shared by the queues it is in. Only one thread touches it. */
struct epi_packet {
    int refs;
    size_t bytes;
    uint8_t data[];
};

struct epi_conn_item;

struct epi_conn {
    int fd;   /* -1: closed */
    int rank; /* of the peer, -1 while unknown */
    uint8_t *in;
    size_t in_bytes;
    size_t in_used; /* parsed already */
    size_t in_cap;
    size_t in_limit; /* bytes we are ready to hold for this peer */
    struct epi_conn_item *out_first;
    struct epi_conn_item *out_last;
    bool is_ready;      /* poll says there is something to read; for the loop's use */
    bool has_unacked;   /* bytes went out that the peer's kernel may not have yet */
    uint64_t last_seq;  /* the peer's last contribution; for rank 0's use */
    const char *doomed; /* why this connection must be closed; NULL: it is fine */
};

#define EPI_CONN_STRANGER_BYTES 256

void epi_conn_init(struct epi_conn *conn, int fd, int rank, size_t in_limit);
void epi_conn_close(struct epi_conn *conn); /* and drop what is queued */
void epi_conn_drop_queue(struct epi_conn *conn);

/* Encodes; NULL without memory. The packet starts with one reference. */
struct epi_packet *epi_packet_make(const struct epi_frame *frame);
void epi_packet_drop(struct epi_packet *packet);

/* Queue a frame. On lack of memory the connection is doomed. */
void epi_conn_send(struct epi_conn *conn, const struct epi_frame *frame);
void epi_conn_send_packet(struct epi_conn *conn, struct epi_packet *packet);
void epi_conn_send_text(struct epi_conn *conn, const struct epi_frame *head, const char *text);

/* As much as goes without waiting. False: the connection is doomed. */
bool epi_conn_flush(struct epi_conn *conn);
bool epi_conn_fill(struct epi_conn *conn);
/* 1: a frame, whose data lives until the next call; 0: none yet; -1: garbage, doomed. */
int epi_conn_next(struct epi_conn *conn, struct epi_frame *frame);

short epi_conn_events(const struct epi_conn *conn); /* for poll */
/* A frame's text as a string. */
void epi_frame_text(const struct epi_frame *frame, char out[EPI_WIRE_TEXT_BYTES + 1]);

#endif
