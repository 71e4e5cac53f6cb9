/* SPDX-License-Identifier: MIT */
/*
 * One connection that carries frames: a queue of packets out, a growing buffer in.
 *
 * Owns the descriptor and both buffers. Used by one thread at a time: the creating thread
 * during the rendezvous, the control thread afterwards. The buffer grows with the bytes that
 * have come, not with the length a header claims.
 * Must not wait, and must not decide what a lost connection means: it marks itself doomed.
 */
#include "src/boot/parts.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#define MIN_IN_BYTES ((size_t)256)
#define MAX_READ_BYTES ((size_t)256 << 10) /* per call, so that no peer starves the others */

/* A rank may have two results to read, and what is said of others. */
#define MAX_OUT_BYTES (2 * EPI_BOOT_MAX_TOTAL_BYTES + ((size_t)4 << 20))

struct epi_conn_item {
    struct epi_conn_item *next;
    struct epi_packet *packet;
    size_t sent_bytes;
};

void epi_conn_init(struct epi_conn *conn, int fd, int rank, size_t in_limit) {
    *conn = (struct epi_conn){.fd = fd, .rank = rank, .in_limit = in_limit, .is_ready = true};
}

void epi_conn_drop_queue(struct epi_conn *conn) {
    while (conn->out_first) {
        struct epi_conn_item *item = conn->out_first;
        conn->out_first = item->next;
        epi_packet_drop(item->packet);
        epi_free(item);
    }
    conn->out_last = NULL;
    conn->out_count = 0;
    conn->out_bytes = 0;
}

void epi_conn_close(struct epi_conn *conn) {
    epi_conn_drop_queue(conn);
    epi_fd_close(&conn->fd);
    epi_free(conn->in);
    conn->in = NULL;
    conn->in_bytes = conn->in_used = conn->in_cap = 0;
}

struct epi_packet *epi_packet_make(const struct epi_frame *frame) {
    size_t bytes = EPI_WIRE_HEADER_BYTES + frame->data_bytes;
    struct epi_packet *packet = epi_alloc(sizeof(*packet) + bytes);
    if (!packet) {
        return NULL;
    }
    packet->refs = 1;
    packet->bytes = bytes;
    epi_wire_header(packet->data, frame);
    if (frame->data_bytes > 0) {
        memcpy(packet->data + EPI_WIRE_HEADER_BYTES, frame->data, frame->data_bytes);
    }
    return packet;
}

void epi_packet_drop(struct epi_packet *packet) {
    if (packet && --packet->refs == 0) {
        epi_free(packet);
    }
}

void epi_conn_send_packet(struct epi_conn *conn, struct epi_packet *packet) {
    if (conn->fd < 0 || conn->doomed) {
        return;
    }
    const size_t bytes = packet ? packet->bytes : 0;
    if (conn->out_limit > 0 &&
        (conn->out_count >= conn->out_limit || conn->out_bytes + bytes > MAX_OUT_BYTES)) {
        conn->doomed = "it does not read what it is told";
        return;
    }
    struct epi_conn_item *item = packet ? epi_alloc(sizeof(*item)) : NULL;
    if (!item) {
        conn->doomed = "no memory to send to it";
        return;
    }
    packet->refs++;
    item->packet = packet;
    if (conn->out_last) {
        conn->out_last->next = item;
    } else {
        conn->out_first = item;
    }
    conn->out_last = item;
    conn->out_count++;
    conn->out_bytes += bytes;
}

void epi_conn_send(struct epi_conn *conn, const struct epi_frame *frame) {
    struct epi_packet *packet = epi_packet_make(frame);
    epi_conn_send_packet(conn, packet);
    epi_packet_drop(packet);
}

void epi_conn_send_text(struct epi_conn *conn, const struct epi_frame *head, const char *text) {
    struct epi_frame frame = *head;
    frame.data = (const uint8_t *)text;
    frame.data_bytes = epi_wire_text_bytes(text);
    epi_conn_send(conn, &frame);
}

bool epi_conn_flush(struct epi_conn *conn) {
    while (!conn->doomed && conn->out_first) {
        struct epi_conn_item *item = conn->out_first;
        ssize_t n = send(conn->fd, item->packet->data + item->sent_bytes,
                         item->packet->bytes - item->sent_bytes, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EINTR) {
                continue;
            }
            if (errno == EAGAIN || errno == EWOULDBLOCK) {
                return true;
            }
            conn->doomed = strerror(errno);
            return false;
        }
        conn->has_unacked = true;
        item->sent_bytes += (size_t)n;
        if (item->sent_bytes == item->packet->bytes) {
            conn->out_first = item->next;
            conn->out_count--;
            conn->out_bytes -= item->packet->bytes;
            if (!conn->out_first) {
                conn->out_last = NULL;
            }
            epi_packet_drop(item->packet);
            epi_free(item);
        }
    }
    return !conn->doomed;
}

static bool grow(struct epi_conn *conn) {
    size_t cap = conn->in_cap * 2;
    if (cap < MIN_IN_BYTES) {
        cap = MIN_IN_BYTES;
    }
    if (cap > conn->in_limit) {
        cap = conn->in_limit;
    }
    uint8_t *in = epi_alloc(cap);
    if (!in) {
        conn->doomed = "no memory to receive from it";
        return false;
    }
    if (conn->in_bytes > 0) {
        memcpy(in, conn->in, conn->in_bytes);
    }
    epi_free(conn->in);
    conn->in = in;
    conn->in_cap = cap;
    return true;
}

bool epi_conn_fill(struct epi_conn *conn) {
    /* Also when sending has failed: what the peer said before it closed is worth reading. */
    bool more = conn->fd >= 0;
    for (size_t total = 0; more && total < MAX_READ_BYTES;) {
        if (conn->in_used > 0) {
            memmove(conn->in, conn->in + conn->in_used, conn->in_bytes - conn->in_used);
            conn->in_bytes -= conn->in_used;
            conn->in_used = 0;
        }
        if (conn->in_bytes == conn->in_cap && (conn->in_cap >= conn->in_limit || !grow(conn))) {
            break; /* let what is here be parsed; if it is no frame, it never will be */
        }
        ssize_t n = recv(conn->fd, conn->in + conn->in_bytes, conn->in_cap - conn->in_bytes, 0);
        more = n > 0 || (n < 0 && errno == EINTR);
        if (n > 0) {
            conn->in_bytes += (size_t)n;
            total += (size_t)n;
        } else if (n == 0) {
            conn->doomed = "its connection was closed";
        } else if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
            conn->doomed = strerror(errno);
        }
    }
    return !conn->doomed;
}

int epi_conn_next(struct epi_conn *conn, struct epi_frame *frame) {
    if (conn->in_used == conn->in_bytes) {
        return 0;
    }
    size_t left = conn->in_bytes - conn->in_used;
    int n = epi_wire_parse(conn->in + conn->in_used, left, frame);
    if (n > 0) {
        conn->in_used += (size_t)n;
        return 1;
    }
    if (n < 0 || left >= conn->in_limit) {
        conn->doomed = "it sent what is no frame of libep";
        return -1;
    }
    return 0;
}

short epi_conn_events(const struct epi_conn *conn) {
    return (short)(POLLIN | (conn->out_first ? POLLOUT : 0));
}

void epi_frame_text(const struct epi_frame *frame, char out[EPI_WIRE_TEXT_BYTES + 1]) {
    size_t bytes = frame->data_bytes;
    if (bytes > EPI_WIRE_TEXT_BYTES) {
        bytes = EPI_WIRE_TEXT_BYTES;
    }
    if (bytes > 0) {
        memcpy(out, frame->data, bytes);
    }
    out[bytes] = '\0';
    for (size_t i = 0; i < bytes;
         i++) { /* it goes to logs and terminals, and ends at its first 0 */
        if ((unsigned char)out[i] < 0x20 || out[i] == 0x7f) {
            out[i] = '?';
        }
    }
}
