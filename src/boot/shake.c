/* SPDX-License-Identifier: MIT */
/*
 * The handshake: rank 0 and another rank prove to each other that they hold the job's key.
 *
 * Owns what is hashed and in which order; docs/decisions/0009-rendezvous.md draws the messages and
 * says why nobody is believed before the proof. Both sides work on a connection's frames and wait
 * for nothing. Runs on the creating thread.
 * Must not let the key, or anything about the job, onto the wire before the other side is proved.
 */
#include "src/boot/parts.h"

#include <string.h>
#include <unistd.h>

/* With their final 0, so that no text is the beginning of another. */
static const char root_label[] = "libep rank 0";
static const char peer_label[] = "libep peer";
static const char key_label[] = "libep key";

void epi_key_make(struct epi_key *key, const void *secret, size_t bytes, const char *job) {
    struct epi_hmac h;
    epi_hmac_begin(&h, secret, bytes);
    epi_hmac_add(&h, key_label, sizeof(key_label));
    epi_hmac_add(&h, job, strlen(job));
    epi_hmac_end(&h, key->bytes);
}

static void begin_proof(struct epi_hmac *h, const struct epi_shake *s, const char *label,
                        size_t label_bytes) {
    uint8_t protocol[4];
    epi_put_u32(protocol, EPI_WIRE_PROTOCOL);
    epi_hmac_begin(h, s->key->bytes, sizeof(s->key->bytes));
    epi_hmac_add(h, label, label_bytes);
    epi_hmac_add(h, protocol, sizeof(protocol));
    epi_hmac_add(h, s->peer_nonce, sizeof(s->peer_nonce));
    epi_hmac_add(h, s->root_nonce, sizeof(s->root_nonce));
}

static void prove_root(const struct epi_shake *s, uint8_t out[EPI_SHA256_BYTES]) {
    struct epi_hmac h;
    begin_proof(&h, s, root_label, sizeof(root_label));
    epi_hmac_end(&h, out);
}

/* `rest` is all of the claim behind the proof. */
static void prove_peer(const struct epi_shake *s, const uint8_t *rest, size_t bytes,
                       uint8_t out[EPI_SHA256_BYTES]) {
    struct epi_hmac h;
    begin_proof(&h, s, peer_label, sizeof(peer_label));
    epi_hmac_add(&h, rest, bytes);
    epi_hmac_end(&h, out);
}

/* ---- the peer's side --------------------------------------------------------------------- */

bool epi_shake_hello(struct epi_shake *s, const struct epi_key *key, struct epi_conn *conn) {
    uint8_t body[EPI_WIRE_HELLO_BYTES];
    *s = (struct epi_shake){.key = key};
    if (!epi_random(s->peer_nonce, sizeof(s->peer_nonce))) {
        return false;
    }
    struct epi_hello hello = {.protocol = EPI_WIRE_PROTOCOL};
    memcpy(hello.nonce, s->peer_nonce, sizeof(hello.nonce));
    epi_wire_put_hello(body, &hello);
    epi_conn_send(conn, &(struct epi_frame){
                            .type = EPI_FRAME_HELLO, .data = body, .data_bytes = sizeof(body)});
    return true;
}

const char *epi_shake_check_root(struct epi_shake *s, const struct epi_frame *frame) {
    struct epi_proof said;
    uint8_t right[EPI_SHA256_BYTES];
    if (s->is_proved || frame->type != EPI_FRAME_PROOF) {
        return "what listens there answers HELLO with something else than a proof";
    }
    epi_wire_get_proof(frame->data, &said);
    if (said.protocol != EPI_WIRE_PROTOCOL) {
        return "what listens there is of another version of libep, whose handshake differs";
    }
    memcpy(s->root_nonce, said.nonce, sizeof(s->root_nonce));
    prove_root(s, right);
    if (!epi_same_bytes(right, said.tag, sizeof(right))) {
        return "what listens there does not hold this job's key: another job, or one whose "
               "EP_JOB or EP_JOB_KEY is another";
    }
    s->is_proved = true;
    return NULL;
}

void epi_shake_claim(struct epi_shake *s, struct epi_conn *conn, const struct epi_claim *claim,
                     const char *text) {
    uint8_t body[EPI_WIRE_CLAIM_BYTES + EPI_WIRE_TEXT_BYTES];
    size_t text_bytes = epi_wire_text_bytes(text);
    size_t bytes = EPI_WIRE_CLAIM_BYTES + text_bytes;
    epi_wire_put_claim(body, claim);
    memcpy(body + EPI_WIRE_CLAIM_BYTES, text, text_bytes);
    prove_peer(s, body + EPI_SHA256_BYTES, bytes - EPI_SHA256_BYTES, body);
    epi_conn_send(
        conn, &(struct epi_frame){.type = EPI_FRAME_CLAIM, .data = body, .data_bytes = bytes});
}

/* ---- rank 0's side ----------------------------------------------------------------------- */

const char *epi_shake_answer(struct epi_shake *s, const struct epi_key *key,
                             const struct epi_frame *frame, struct epi_conn *conn) {
    struct epi_hello hello;
    struct epi_proof proof = {.protocol = EPI_WIRE_PROTOCOL};
    uint8_t body[EPI_WIRE_PROOF_BYTES];
    if (s->has_answered || frame->type != EPI_FRAME_HELLO) {
        return "its first frame is not HELLO";
    }
    epi_wire_get_hello(frame->data, &hello);
    *s = (struct epi_shake){.key = key, .has_answered = true};
    memcpy(s->peer_nonce, hello.nonce, sizeof(s->peer_nonce));
    if (!epi_random(s->root_nonce, sizeof(s->root_nonce))) {
        return "this host gives no random numbers";
    }
    /* To another version a proof would mean nothing, but it learns that this is one. */
    memcpy(proof.nonce, s->root_nonce, sizeof(proof.nonce));
    if (hello.protocol == EPI_WIRE_PROTOCOL) {
        prove_root(s, proof.tag);
    }
    epi_wire_put_proof(body, &proof);
    epi_conn_send(conn, &(struct epi_frame){
                            .type = EPI_FRAME_PROOF, .data = body, .data_bytes = sizeof(body)});
    return hello.protocol == EPI_WIRE_PROTOCOL
               ? NULL
               : "it is of another version of libep, whose handshake differs";
}

const char *epi_shake_check_claim(struct epi_shake *s, const struct epi_frame *frame,
                                  struct epi_claim *claim) {
    uint8_t right[EPI_SHA256_BYTES];
    if (!s->has_answered || s->is_proved || frame->type != EPI_FRAME_CLAIM) {
        return "it answers the proof with something else than its own";
    }
    prove_peer(s, frame->data + EPI_SHA256_BYTES, frame->data_bytes - EPI_SHA256_BYTES, right);
    if (!epi_same_bytes(right, frame->data, sizeof(right))) {
        return "it does not hold this job's key";
    }
    s->is_proved = true;
    epi_wire_get_claim(frame->data, claim);
    return NULL;
}

/* ---- what a rank says of itself ---------------------------------------------------------- */

static uint64_t drawn;

static void draw(void) {
    if (!epi_random(&drawn, sizeof(drawn))) {
        drawn = (uint64_t)epi_now_ns();
    }
}

uint64_t epi_this_process(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, draw);
    pid_t pid = getpid(); /* a forked child has the same draw */
    return epi_hash(drawn, &pid, sizeof(pid));
}

uint64_t epi_this_host(void) {
    struct epi_host_hint hint;
    epi_host_hint(&hint);
    return hint.boot != 0 && hint.net_inode != 0 ? epi_hash(EPI_HASH_BEGIN, &hint, sizeof(hint))
                                                 : 0;
}
