/* SPDX-License-Identifier: MIT */
/*
 * Inside src/boot: what its files know of each other. Frames are in wire.h.
 *
 * Processes meet over TCP (launch, meet) and stay connected by a star of connections that one
 * thread of each serves (star); ranks that are threads share a world. Both gather in rounds. Each
 * file says which thread may call it.
 */
#ifndef EPI_BOOT_PARTS_H
#define EPI_BOOT_PARTS_H

#include <poll.h>
#include <sys/socket.h>
#include <sys/types.h>

#include "src/boot/boot.h"
#include "src/boot/wire.h"

/* ---- addr.c: addresses --------------------------------------------------------------------- */

#define EPI_ADDR_TEXT_BYTES 72

struct epi_addr {
    struct sockaddr_storage ss;
    socklen_t len;
};

/* A host as people write it, with or without a port: "name", "1.2.3.4:5", "[v6]:5", "v6", blanks or
 * "tcp://" around it. *port is 0 where there is none. NULL, or what is wrong with it, in words. */
const char *epi_addr_parse(const char *text, char host[256], int *port);
/* The host is this one, whatever host this is. */
bool epi_addr_is_loopback(const char *host);
/* Fills up to max addresses; NULL, or why not in words. is_name: the host is not a literal. */
const char *epi_addr_resolve(const char *host, int port, struct epi_deadline deadline,
                             struct epi_addr *out, int max, int *num, bool *is_name);
void epi_addr_set_port(struct epi_addr *addr, int port);
void epi_addr_text(const struct epi_addr *addr, char out[EPI_ADDR_TEXT_BYTES]);

/* ---- sock.c: sockets --------------------------------------------------------------------- */

/* Not blocking, closed on exec and in forked children, with a quick verdict on peers whose host has
 * vanished. */

/* A descriptor, or -errno. */
int epi_sock_listen(const struct epi_addr *addr);
int epi_sock_accept(int listen_fd, struct epi_addr *from);
int epi_sock_connect(const struct epi_addr *addr, struct epi_deadline deadline);
/* An abstract Unix address. */
void epi_addr_unix(const char *name, struct epi_addr *out);
/* Whether the process at the other end of a Unix socket is this user's; who it is, for people. */
bool epi_sock_is_same_user(int fd, int *uid, int *pid);
/* An eventfd that is, as the sockets are, closed in forked children. */
int epi_sock_kicker(void);

/* Bytes the peer's kernel has not acknowledged yet. */
bool epi_sock_has_unacked(int fd);
/* The peer's kernel has been silent for seconds although it owes an answer. A stopped process
 * is not silent: its kernel answers. */
bool epi_sock_vanished(int fd);

/* ---- conn.c: one connection that carries frames ------------------------------------------ */

/* Not blocking in either direction. */

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
    int out_count;      /* packets in the queue */
    int out_limit;      /* of them; more: the peer does not read. 0: no limit */
    size_t out_bytes;   /* in the queue */
    bool is_ready;      /* poll says there is something to read; for the loop's use */
    bool has_unacked;   /* bytes went out that the peer's kernel may not have yet */
    uint64_t last_seq;  /* the peer's last contribution; for rank 0's use */
    int num_words;      /* it has said */
    uint64_t last_ask;  /* and its last question; */
    bool has_asked;     /* one during the rendezvous */
    const char *doomed; /* why this connection must be closed; NULL: it is fine */
};

/* Packets that may wait for a rank beside what each other rank can say, and what is said of it. */
#define EPI_CONN_MAX_OUT 16
#define EPI_CONN_STRANGER_BYTES 512 /* what a connection may send before its rank is proved */

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

/* ---- rounds.c: the rounds of an allgather, where they meet ------------------------------- */

#define EPI_ROUND_TEXT_BYTES 200

struct epi_round {
    struct epi_round *next;
    uint64_t seq;
    size_t bytes;   /* of each rank */
    int first_rank; /* who set `bytes` */
    int num_in;
    int num_out; /* ranks that have taken the result, or given up; for worlds */
    bool is_mismatch;
    char text[EPI_ROUND_TEXT_BYTES]; /* the mismatch in words */
    bool *have;                      /* [num_ranks] */
    uint8_t *data;                   /* [num_ranks][bytes] */
};

struct epi_rounds {
    int num_ranks;
    struct epi_round *first;
};

/* Adds a rank's contribution, making the round if it is the first; NULL without memory. */
struct epi_round *epi_rounds_put(struct epi_rounds *rounds, uint64_t seq, int rank,
                                 const void *in, size_t bytes);
struct epi_round *epi_rounds_find(struct epi_rounds *rounds, uint64_t seq);
void epi_rounds_remove(struct epi_rounds *rounds, struct epi_round *round);
void epi_rounds_clear(struct epi_rounds *rounds);

/* "1, 3, 5-9" of those i < num with set[i] == value, cut with "..." to fit. */
void epi_rank_list(const bool *set, bool value, int num, char *out, size_t out_bytes);

/* ---- starter.c: who started a job without a name ------------------------------------------ */

struct epi_starter {
    int pid;                  /* a process; or -(a process group) whose starter has ended */
    unsigned long long start; /* when the process began, in ticks since boot */
    char name[20];
};

/* The nearest ancestor that was not started with this process's value of the variable `name`:
 * the launcher that set it. by_hand: nor is it a shell's subshell. False: it cannot be seen. */
bool epi_starter_find(const char *name, bool by_hand, struct epi_starter *out);
void epi_starter_text(const struct epi_starter *starter, char *out, size_t bytes);
/* Of the namespace in which the numbers of processes hold. */
uint64_t epi_starter_namespace(void);
/* EP_ERR_MISMATCH if that process has started two processes as the same rank, by RANK, of what
 * cannot be told from this job: then they are of two jobs. */
ep_status epi_starter_census(const struct epi_starter *starter, int num_ranks);

/* ---- launch.c: what the launcher's environment says -------------------------------------- */

/* Who I am, where rank 0 is, which job this is. */

#define EPI_LAUNCH_MAX_PORTS 4
#define EPI_JOB_NAME_BYTES 2048
#define EPI_JOB_GIVEN_BYTES 200 /* of EP_JOB, and of the caller's name */

struct epi_job {
    /* What the ranks of the job have in common, and no other job has; where the text came from
     * is part of it. Equal on all ranks. Without a name it is empty. */
    char name[EPI_JOB_NAME_BYTES];
    uint64_t id;       /* hash of it */
    bool is_named;     /* false: nobody gave a name, so id is the same for all such jobs */
    char from[128];    /* for the log */
    const char *given; /* the caller's name, or NULL */
};

struct epi_launch {
    int rank;
    int num_ranks;
    bool is_local;  /* all ranks are on this host, so they need neither host nor port */
    bool is_spread; /* the launcher says that they are on several hosts */
    char host[256]; /* of rank 0: a name or a literal without brackets */
    /* Where rank 0 may listen: it takes the first it can have, and the others try all in turn,
     * since anybody's may be the program that answers at one of them. */
    int ports[EPI_LAUNCH_MAX_PORTS];
    int num_ports;
    char note[256]; /* "", or what the text of a timeout says besides */
    bool by_hand;   /* RANK by whoever, who may have left a rank of an earlier job behind ... */
    struct epi_starter starter; /* ... and this started the ranks */
};

/* `given` is the caller's name, which stays his; NULL: EP_JOB or the launcher's. */
ep_status epi_launch_job(const char *given, struct epi_job *out);
/* For ranks that meet by the environment: the job is then named anew, by all that tells it from
 * others; where nothing does, by the process that started its ranks. */
ep_status epi_launch_read(struct epi_job *job, struct epi_launch *out);
/* Rank 0, when all have come: EP_ERR_MISMATCH if some may be of another job. */
ep_status epi_launch_check(const struct epi_launch *launch);
/* The first host of a Slurm node list: "node[03-07,9]" is "node03". False: not understood. */
bool epi_launch_first_host(const char *list, char *out, size_t out_bytes);

/* ---- shake.c: both sides prove that they hold the job's key -------------------------------- */

/* docs/decisions/0009-rendezvous.md has the messages. Functions that check return NULL, or what was
 * wrong in words. */

struct epi_key {
    uint8_t bytes[EPI_SHA256_BYTES];
};

/* Of one connection, at one of its ends. */
struct epi_shake {
    const struct epi_key *key;
    uint8_t peer_nonce[EPI_WIRE_NONCE_BYTES];
    uint8_t root_nonce[EPI_WIRE_NONCE_BYTES];
    bool has_answered; /* rank 0 has answered HELLO */
    bool is_proved;    /* the other end has proved itself */
};

/* `secret` may be of no bytes, where something else says who is at the other end. */
void epi_key_make(struct epi_key *key, const void *secret, size_t bytes, const char *job);

/* The peer's side, in this order. False: this host gives no random numbers. */
bool epi_shake_hello(struct epi_shake *s, const struct epi_key *key, struct epi_conn *conn);
const char *epi_shake_check_root(struct epi_shake *s, const struct epi_frame *frame);
void epi_shake_claim(struct epi_shake *s, struct epi_conn *conn, const struct epi_claim *claim,
                     const char *text);

/* Rank 0's side, in this order; *s is zeroed before. */
const char *epi_shake_answer(struct epi_shake *s, const struct epi_key *key,
                             const struct epi_frame *frame, struct epi_conn *conn);
const char *epi_shake_check_claim(struct epi_shake *s, const struct epi_frame *frame,
                                  struct epi_claim *claim);

uint64_t epi_this_process(void);
uint64_t epi_this_host(void); /* 0: unknown */

/* ---- way.c: where the ranks meet, and what they need to hold ------------------------------- */

#define EPI_MEET_MAX_ADDRS 16
/* An answer that is owed after the deadline: who is missing, or why one was turned away. */
#define EPI_MEET_GRACE_NS (EPI_NS_PER_S / 2)
/* How long a rank that has failed tries to say so, and rank 0 of a rendezvous that has. */
#define EPI_MEET_SAY_FAILED_NS (3 * EPI_NS_PER_S / 2)

struct epi_meet {
    int rank;
    int num_ranks;
    struct epi_key key;
    bool is_job_named; /* a rank of this job with another idea of it makes all ranks fail */
    bool over_tcp;     /* else over an abstract Unix socket: all ranks are on this host */
    bool may_be_far;   /* the address does not say that: for the text of a timeout */
    char host[256];    /* of rank 0; empty: the ranks have their key from an allgather ... */
    int port;
    struct epi_addr
        given[EPI_MEET_MAX_ADDRS]; /* ... and, on several hosts, rank 0's addresses */
    int num_given;
    char where[300];          /* rank 0's address, for people */
    struct epi_launch launch; /* all 0, but where the ranks meet by the environment */
    bool has_failed;          /* this rank comes only to say why */
    char failed[EPI_WIRE_TEXT_BYTES];
    int64_t timeout_ns;
    struct epi_deadline deadline;
};

/* Where rank 0 listens: one Unix socket, or an address of this host each. */
struct epi_listeners {
    int num;
    int fds[EPI_MEET_MAX_ADDRS];
    int guest; /* 0, or a Unix connection that has been made already: fuzzers come so */
};

/* Host, port and the job's name are known: makes the key, chooses between TCP and Unix, says where. */
ep_status epi_meet_choose(struct epi_meet *meet, const char *job);
/* The same where the ranks have a secret from an allgather. */
void epi_meet_choose_shared(struct epi_meet *meet, const void *secret, size_t bytes);
/* Then, where they are on several hosts: rank 0 listens at a port of the kernel's choice, on all addresses
 * of this host that EP_IFNAME names, and says in text which ("host:port,host:port"); others take that. */
ep_status epi_meet_listen_far(struct epi_listeners *out, char *text, size_t bytes);
ep_status epi_meet_take_far(struct epi_meet *meet, const char *text);
/* The addresses to be tried, in this order; NULL, or why there are none. */
const char *epi_meet_places(const struct epi_meet *meet,
                            struct epi_addr out[EPI_MEET_MAX_ADDRS], int *num);
/* Why, after what has been tried, no rank can come from where the address says; "": it is not known.
 * Asks no longer than until the deadline. */
void epi_meet_doubt(const struct epi_meet *meet, struct epi_deadline deadline, char out[200]);

ep_status epi_meet_listen(const struct epi_meet *meet, struct epi_listeners *out);
void epi_listeners_close(struct epi_listeners *listeners);

/* ---- cards.c: what ranks tell each other by the caller's allgather -------------------------- */

/* Every rank takes part, one that has failed with `own` and its text in epi_error_text(): the
 * others are in it. Then *meet knows the key; rank 0 listens. Ranks of several hosts use it twice. */
ep_status epi_cards_exchange(const struct epi_boot_config *config, struct epi_meet *meet,
                             ep_status own, struct epi_listeners *listeners);

/* ---- meet_root.c, meet_peer.c: from addresses to open connections ------------------------ */

/* Rank 0: fills conns[1..num_ranks-1]; on failure all are closed, and told why. */
ep_status epi_meet_root(const struct epi_meet *meet, const struct epi_listeners *listeners,
                        struct epi_conn *conns);
/* Rank 0: all are here; queued, sent by whoever flushes the connections next. */
void epi_meet_start(struct epi_conn *conns, int num_ranks);
/* Rank 0: gives up; tells every open connection and closes it. */
void epi_meet_reject_all(struct epi_conn *conns, int num_ranks, ep_status status,
                         const char *text);
/* Others: a connection to rank 0, after its START. */
ep_status epi_meet_peer(const struct epi_meet *meet, struct epi_conn *conn);
/* The same over a connection that has been made, and without a second try. */
ep_status epi_meet_peer_over(const struct epi_meet *meet, int fd, struct epi_conn *conn);

uint32_t epi_meet_version(void);

/* ---- star.c, star_call.c: the control star after the rendezvous -------------------------- */

/* star.c is the control thread, star_call.c what the caller's thread does. */

/* Calls of a rank that may be unanswered at a time. */
#define EPI_STAR_MAX_OPEN 2

enum epi_rank_state { EPI_RANK_ALIVE, EPI_RANK_DEAD, EPI_RANK_LEFT };

/* The one collective this rank may be in. */
struct epi_request {
    bool active;  /* a caller waits; out is its memory */
    bool done;    /* status is set, and out when it is EP_OK */
    bool ask;     /* the caller has run out of time: find out for whom it waited */
    bool told;    /* text says for whom */
    uint64_t seq; /* the number of this rank's call */
    void *out;
    size_t bytes;
    ep_status status;
    char text[EPI_WIRE_TEXT_BYTES + 1];
};

struct epi_star {
    int rank;
    int num_ranks;
    uint32_t process; /* of the process whose thread serves this star */
    void (*on_dead)(void *ctx, int rank, const char *why);
    void (*on_told)(void *ctx, uint64_t word);
    void *ctx;
    pthread_t thread;
    bool has_thread;
    int kick_fd; /* wakes the control thread */

    /* The control thread's own: rank 0 has one connection per rank (its own stays closed), the
     * others have one, to rank 0. */
    struct epi_conn *conns;
    int num_conns;
    struct pollfd *polls;

    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t cond;
    bool stop;
    struct epi_request req;
    struct epi_packet *posted;         /* a contribution the control thread has not taken yet */
    uint64_t word[EPI_BOOT_MAX_WORDS]; /* said here ... */
    int num_words, num_words_sent;
    size_t lacks; /* bytes there was no memory for: this rank does not come, and is gone */
    uint64_t num_calls;
    uint64_t num_ended; /* calls that all have made and that have their result */
    uint8_t *state;     /* [num_ranks] enum epi_rank_state */
    ep_status broken;   /* not EP_OK: no collective can succeed any more */
    char broken_text[EPI_WIRE_TEXT_BYTES + 1];
    struct epi_rounds rounds; /* rank 0's */
};

/* The star without connections and without its thread. */
ep_status epi_star_make(struct epi_star **out, int rank, int num_ranks);
/* Starts the control thread; the connections are open. 0 or errno. */
int epi_star_run(struct epi_star *star);
void epi_star_free(struct epi_star *star);

ep_status epi_star_allgather(struct epi_star *star, const void *in, size_t bytes, void *out,
                             struct epi_deadline deadline);
void epi_star_tell(struct epi_star *star, uint64_t word);

/* The control thread's main function. */
void *epi_star_main(void *star);

/* ---- world.c: ranks that are threads of one process -------------------------------------- */

struct epi_session;

int epi_world_num_ranks(ep_world *world);
/* Collective: waits for all ranks of the world. */
ep_status epi_world_join(ep_world *world, int rank, int64_t timeout_ns,
                         struct epi_session **out);
ep_status epi_world_allgather(struct epi_session *session, int rank, const void *in,
                              size_t bytes, void *out, struct epi_deadline deadline);
/* Words of the others are told to `rank` from now on, until it leaves, on their threads. */
void epi_world_listen(struct epi_session *session, int rank,
                      void (*on_told)(void *ctx, uint64_t word), void *ctx);
void epi_world_tell(struct epi_session *session, int rank, uint64_t word);
void epi_world_leave(struct epi_session *session, int rank);
/* A rank that cannot come: the others, who wait for it, get EP_ERR_PEER with this reason. */
void epi_world_fail(ep_world *world, int rank, const char *why);

#endif
