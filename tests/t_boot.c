/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * How ranks meet: as threads of a world, by the caller's allgather, at an address, and as the
 * environment of each launcher says; who is turned away and what is said; that nothing is left.
 */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "src/boot/boot.h"
#include "src/boot/launch.h"
#include "src/boot/wire.h"
#include "tests/gpu.h"
#include "tests/tap.h"

#define LONG_NS (30 * EPI_NS_PER_S)
#define SHORT_NS (800 * EPI_NS_PER_MS)

static struct epi_deadline in_time(void) {
    return epi_deadline_after(LONG_NS);
}

static bool says(const char *what) {
    bool found = strstr(ep_last_error(), what) != NULL;
    if (!found) {
        diag("\"%s\" does not say \"%s\"", ep_last_error(), what);
    }
    return found;
}

static struct epi_boot_config config_at(char address[32], int port, int rank, int num_ranks) {
    snprintf(address, 32, "127.0.0.1:%d", port);
    return (struct epi_boot_config){
        .rank = rank, .num_ranks = num_ranks, .address = address, .timeout_ns = LONG_NS};
}

/* The group works: everyone's bytes arrive, in order. */
static void check_group(struct epi_boot *boot, int rank, int num_ranks) {
    int mine[2] = {rank, rank * 7};
    int all[64][2];
    ok(epi_boot_rank(boot) == rank && epi_boot_num_ranks(boot) == num_ranks, "who I am");
    for (int i = 0; i < 5; i++) {
        ep_status st = epi_boot_allgather(boot, mine, sizeof mine, all, in_time());
        ok(st == EP_OK, "allgather: %s", ep_last_error());
        for (int r = 0; r < num_ranks; r++) {
            ok(all[r][0] == r && all[r][1] == r * 7, "rank %d's bytes are in place", r);
        }
        ok(epi_boot_barrier(boot, in_time()) == EP_OK, "barrier: %s", ep_last_error());
    }
}

static int num_tasks(void) {
    int num = 0;
    DIR *dir = opendir("/proc/self/task");
    while (dir != NULL && readdir(dir) != NULL) {
        num++;
    }
    if (dir != NULL) {
        closedir(dir);
    }
    return num;
}

struct footprint {
    int num_fds;
    int num_tasks;
    int64_t live;
};

static struct footprint footprint_now(void) {
    return (struct footprint){tap_num_fds(), num_tasks(), epi_alloc_live()};
}

static bool same_footprint(struct footprint was) {
    struct footprint is = footprint_now();
    /* A joined thread may be listed for a moment longer. */
    for (int i = 0; i < 100 && is.num_tasks != was.num_tasks; i++) {
        tap_sleep_ms(5);
        is = footprint_now();
    }
    if (is.num_fds == was.num_fds && is.num_tasks == was.num_tasks && is.live == was.live) {
        return true;
    }
    diag("fds %d -> %d, threads %d -> %d, allocations %lld -> %lld", was.num_fds, is.num_fds,
         was.num_tasks, is.num_tasks, (long long)was.live, (long long)is.live);
    return false;
}

/* ---- address, callback, environment ---- */

struct meeting {
    int port;
    int num_ranks;
    void (*set_env)(int rank, int num_ranks, int port);
    pthread_barrier_t *barrier; /* for the callback */
    unsigned char *cards;
};

static int allgather(void *ctx, const void *in, void *out, size_t bytes) {
    struct meeting *m = ctx;
    /* The rank is hidden in the caller's context in real life; here it is the process's. */
    int rank = atoi(getenv("TEST_RANK"));
    memcpy(m->cards + (size_t)rank * bytes, in, bytes);
    pthread_barrier_wait(m->barrier);
    memcpy(out, m->cards, bytes * (size_t)m->num_ranks);
    pthread_barrier_wait(m->barrier);
    return 0;
}

static int meet_rank(int rank, void *ctx) {
    struct meeting *m = ctx;
    struct footprint was = footprint_now();
    char address[32];
    char text[16];
    struct epi_boot *boot = NULL;
    struct epi_boot_config config = config_at(address, m->port, rank, m->num_ranks);
    if (m->barrier != NULL) {
        snprintf(text, sizeof text, "%d", rank);
        setenv("TEST_RANK", text, 1);
        config.address = NULL;
        config.allgather = allgather;
        config.allgather_ctx = m;
    } else if (m->set_env != NULL) {
        config.address = NULL;
        config.rank = config.num_ranks = -1;
        m->set_env(rank, m->num_ranks, m->port);
    }
    for (int round = 0; round < 2; round++) { /* the address serves a second group too */
        ep_status st = epi_boot_create(&boot, &config);
        if (!ok(st == EP_OK, "create: %s", ep_last_error())) {
            return 1;
        }
        ok(!epi_boot_is_threads(boot), "ranks are processes");
        check_group(boot, rank, m->num_ranks);
        epi_boot_destroy(&boot);
        ok(boot == NULL, "destroy clears the pointer");
    }
    ok(same_footprint(was), "nothing is left");
    return 0;
}

static void put(const char *name, int value) {
    char text[16];
    snprintf(text, sizeof text, "%d", value);
    setenv(name, text, 1);
}

static void env_torchrun(int rank, int num_ranks, int port) {
    put("RANK", rank);
    put("WORLD_SIZE", num_ranks);
    setenv("MASTER_ADDR", "localhost", 1);
    put("MASTER_PORT", port - 1);
    setenv("TORCHELASTIC_RUN_ID", "none", 1);
}

static void env_open_mpi(int rank, int num_ranks, int port) {
    put("OMPI_COMM_WORLD_RANK", rank);
    put("OMPI_COMM_WORLD_SIZE", num_ranks);
    put("OMPI_COMM_WORLD_LOCAL_SIZE", num_ranks);
    put("PMIX_RANK", rank);
    put("PMIX_NAMESPACE", port); /* the port is derived from it */
}

static void env_pmi(int rank, int num_ranks, int port) {
    put("PMI_RANK", rank);
    put("PMI_SIZE", num_ranks);
    put("MPI_LOCALNRANKS", num_ranks);
    put("EP_PORT", port);
}

static void env_slurm(int rank, int num_ranks, int port) {
    put("SLURM_PROCID", rank);
    put("SLURM_STEP_NUM_TASKS", num_ranks);
    put("SLURM_JOB_ID", port);
    put("SLURM_STEP_ID", 0);
    put("SLURM_NNODES", 2);
    setenv("SLURM_STEP_NODELIST", "127.0.0.[1-4,9]", 1);
    put("EP_PORT", port);
}

static void test_processes(void) {
    struct meeting m = {.port = tap_free_port(), .num_ranks = 4};
    ok(tap_spawn_ranks(4, meet_rank, &m, 60) == 0, "4 processes meet at an address");
    m.num_ranks = 1;
    ok(tap_spawn_ranks(1, meet_rank, &m, 60) == 0, "1 process meets itself");
    m.num_ranks = 17;
    ok(tap_spawn_ranks(17, meet_rank, &m, 60) == 0, "17 processes meet");

    static const struct {
        const char *name;
        void (*set_env)(int rank, int num_ranks, int port);
    } launchers[] = {{"RANK and MASTER_ADDR", env_torchrun},
                     {"Open MPI, all local", env_open_mpi},
                     {"PMI and EP_PORT", env_pmi},
                     {"Slurm's node list", env_slurm}};
    m.num_ranks = 3;
    for (size_t i = 0; i < sizeof launchers / sizeof launchers[0]; i++) {
        m.port = tap_free_port() + 1;
        m.set_env = launchers[i].set_env;
        ok(tap_spawn_ranks(3, meet_rank, &m, 60) == 0, "environment: %s", launchers[i].name);
    }
    m.set_env = NULL;
    m.barrier = tap_shared(sizeof *m.barrier);
    m.cards = tap_shared(1 << 16);
    pthread_barrierattr_t attr;
    pthread_barrierattr_init(&attr);
    pthread_barrierattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(m.barrier, &attr, 3);
    ok(tap_spawn_ranks(3, meet_rank, &m, 60) == 0, "the caller's allgather");
}

static void test_environment_errors(void) {
    struct epi_boot *boot = NULL;
    struct epi_boot_config config = {.rank = -1, .num_ranks = -1, .timeout_ns = SHORT_NS};
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && says("ep run") && says("WORLD_SIZE"),
       "no environment: the message says what to do");
    setenv("RANK", "1", 1);
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && says("RANK is set"), "half of one");
    setenv("WORLD_SIZE", "2", 1);
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && says("MASTER_ADDR"), "no MASTER_ADDR");
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    setenv("RANK", "2", 1);
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && says("RANK=\"2\"") && says("0..1"),
       "a rank out of range");
    setenv("RANK", "1x", 1);
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && says("1x"), "a rank that is no number");
    setenv("RANK", "1", 1);
    setenv("MASTER_PORT", "65535", 1);
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && says("65534"),
       "no port above the last");
    static const char *const names[] = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"};
    for (size_t i = 0; i < 4; i++) {
        unsetenv(names[i]);
    }
    setenv("SLURM_PROCID", "0", 1);
    setenv("SLURM_NTASKS", "8", 1);
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && says("SLURM_PROCID"),
       "a Slurm batch script is not a rank");
    unsetenv("SLURM_PROCID");
    unsetenv("SLURM_NTASKS");
    config.rank = 0;
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && says("must be -1"), "half a config");
    static const char *const bad[] = {"host",       "host:", ":5",     "host:0",
                                      "host:65536", "::1:5", "[::1:5", "host:5x"};
    config.num_ranks = 2;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        config.address = bad[i];
        ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && says(bad[i]), "address %s", bad[i]);
    }
    config.address = "127.0.0.1:5";
    config.rank = 2;
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && says("rank is 2"), "rank 2 of 2");
    config.num_ranks = EP_MAX_RANKS + 1;
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && says("1025"), "too many ranks");
}

static void test_node_lists(void) {
    static const char *const lists[][2] = {
        {"node03", "node03"},           {"node03,node04", "node03"},
        {"node[03-07,9]", "node03"},    {"gpu-a[7]", "gpu-a7"},
        {"n[1-2]r[3-4],x", "n1r3"},     {"a[1,2].cluster.org", "a1.cluster.org"},
        {"10.0.0.[12-15]", "10.0.0.12"}};
    char host[64];
    for (size_t i = 0; i < sizeof lists / sizeof lists[0]; i++) {
        bool good = epi_launch_first_host(lists[i][0], host, sizeof host);
        ok(good && strcmp(host, lists[i][1]) == 0, "first host of %s", lists[i][0]);
    }
    ok(!epi_launch_first_host("", host, sizeof host), "an empty list");
    ok(!epi_launch_first_host("n[1-2", host, sizeof host), "a broken list");
    ok(!epi_launch_first_host("a-long-name", host, 5), "a name that does not fit");
}

/* ---- who does not belong ---- */

struct odd {
    int port;
    int num_ranks;
    const char *good_job;
};

static ep_status join(struct odd *o, int rank, int num_ranks, const char *job,
                      int64_t timeout_ns, struct epi_boot **boot) {
    char address[32];
    struct epi_boot_config config = config_at(address, o->port, rank, num_ranks);
    config.job = job;
    config.timeout_ns = timeout_ns;
    return epi_boot_create(boot, &config);
}

static int wrong_job_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct footprint was = footprint_now();
    struct epi_boot *boot = NULL;
    if (rank == 1) {
        ep_status st = join(o, 1, 2, "red", LONG_NS, &boot);
        ok(st == EP_ERR_MISMATCH && says("another job is using this address"), "red is told");
        ok(same_footprint(was), "nothing is left of the failure");
    }
    ok(join(o, rank, 2, "blue", LONG_NS, &boot) == EP_OK, "blue meets: %s", ep_last_error());
    if (boot != NULL) {
        check_group(boot, rank, 2);
    }
    epi_boot_destroy(&boot);
    return 0;
}

/* Rank 2 of the test is a second rank 1 of a group of 3 whose real rank 2 comes last. */
static int duplicate_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct epi_boot *boot = NULL;
    if (rank == 2) {
        tap_sleep_ms(500);
        ep_status st = join(o, 1, 3, "blue", LONG_NS, &boot);
        ok(st == EP_ERR_MISMATCH && says("two processes claim to be rank 1"), "it is told");
    }
    ok(join(o, rank, 3, "blue", LONG_NS, &boot) == EP_OK, "the others: %s", ep_last_error());
    epi_boot_destroy(&boot);
    return 0;
}

static int world_size_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct epi_boot *boot = NULL;
    ep_status st = join(o, rank, rank == 1 ? 4 : 3, "blue", LONG_NS, &boot);
    if (rank == 2 && st == EP_ERR_TIMEOUT) {
        return 0; /* came after all was over, and rank 0 was gone */
    }
    ok(st == EP_ERR_MISMATCH && says("rank 1 was told there are 4 ranks") && says("told 3"),
       "all are told");
    return 0;
}

static int dial(int port) {
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int i = 0; i < 2000; i++) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(fd, (struct sockaddr *)&addr, sizeof addr) == 0) {
            return fd;
        }
        close(fd);
        tap_sleep_ms(5);
    }
    return -1;
}

static void say(int fd, const void *data, size_t bytes) {
    ok(send(fd, data, bytes, MSG_NOSIGNAL) == (ssize_t)bytes, "the stranger speaks");
}

static size_t hello_bytes(uint8_t out[64], uint32_t version) {
    struct epi_hello hello = {EPI_WIRE_PROTOCOL, version, 2, 1, 0};
    struct epi_frame frame = {.type = EPI_FRAME_HELLO, .data_bytes = EPI_WIRE_HELLO_BYTES};
    epi_wire_header(out, &frame);
    epi_wire_put_hello(out + EPI_WIRE_HEADER_BYTES, &hello);
    return EPI_WIRE_HEADER_BYTES + EPI_WIRE_HELLO_BYTES;
}

static int strangers_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct footprint was = footprint_now();
    struct epi_boot *boot = NULL;
    if (rank == 1) {
        static const char http[] = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
        uint8_t frame[64];
        char answer[512] = "";
        int silent = dial(o->port);
        int slow = dial(o->port);
        say(slow, "LEP", 3); /* begins well and never goes on */
        int garbage = dial(o->port);
        say(garbage, http, sizeof http - 1);
        ok(recv(garbage, answer, sizeof answer, 0) <= 0, "garbage is hung up on");
        int liar = dial(o->port);
        struct epi_frame lie = {.type = EPI_FRAME_RESULT, .data_bytes = 200 << 20};
        epi_wire_header(frame, &lie);
        say(liar, frame, EPI_WIRE_HEADER_BYTES);
        for (int i = 0; i < 64; i++) {
            (void)!send(liar, answer, sizeof answer, MSG_NOSIGNAL);
        }
        ok(recv(liar, answer, sizeof answer, 0) <= 0, "a stranger may not fill our memory");
        int old = dial(o->port);
        say(old, frame, hello_bytes(frame, 1));
        ssize_t n = recv(old, answer, sizeof answer - 1, 0);
        struct epi_frame reject;
        ok(n > 0 && epi_wire_parse((uint8_t *)answer, (size_t)n, &reject) > 0 &&
               reject.type == EPI_FRAME_REJECT && reject.status == EP_ERR_VERSION,
           "another version is told so");
        int gone = dial(o->port);
        close(gone);
        ok(join(o, 1, 2, NULL, LONG_NS, &boot) == EP_OK, "the rank: %s", ep_last_error());
        int fds[] = {silent, slow, garbage, liar, old};
        for (int i = 0; i < 5; i++) {
            close(fds[i]);
        }
    } else {
        ok(join(o, 0, 2, NULL, LONG_NS, &boot) == EP_OK, "rank 0: %s", ep_last_error());
    }
    if (boot != NULL) {
        check_group(boot, rank, 2);
    }
    epi_boot_destroy(&boot);
    ok(same_footprint(was), "nothing is left");
    return 0;
}

/* Ranks 0 and 2 of 4 come. */
static int missing_rank(int rank, void *ctx) {
    struct odd *o = ctx;
    struct footprint was = footprint_now();
    struct epi_boot *boot = NULL;
    double start = tap_now();
    /* Once rank 0's clock runs out first, once the other's. */
    int64_t timeout_ns = (rank == 0) == (o->num_ranks == 0) ? SHORT_NS : SHORT_NS * 3;
    ep_status st = join(o, rank * 2, 4, NULL, timeout_ns, &boot);
    double took = tap_now() - start;
    bool is_first = timeout_ns == SHORT_NS;
    if (is_first || rank == 1) {
        ok(st == EP_ERR_TIMEOUT && says("missing: 1, 3") && says("2 of 4"), "the missing");
    } else {
        ok(st == EP_ERR_PEER && says("rank 2 came and went"), "rank 0 learns that 2 gave up");
    }
    ok(took < 10.0, "in time: %.1f s", took);
    ok(same_footprint(was), "nothing is left");
    return 0;
}

static void test_turned_away(void) {
    struct odd o = {.port = tap_free_port()};
    tap_expect_log("turned away");
    tap_expect_log("dropped a connection");
    ok(tap_spawn_ranks(2, wrong_job_rank, &o, 60) == 0, "another job's rank is turned away");
    ok(tap_spawn_ranks(3, duplicate_rank, &o, 60) == 0, "a rank that is there already is too");
    ok(tap_spawn_ranks(2, world_size_rank, &o, 60) == 0, "another world size fails the job");
    ok(tap_spawn_ranks(2, strangers_rank, &o, 60) == 0, "strangers do not disturb");
    ok(tap_spawn_ranks(2, missing_rank, &o, 60) == 0, "missing ranks are named by rank 0");
    o.num_ranks = 1;
    ok(tap_spawn_ranks(2, missing_rank, &o, 60) == 0, "and by another rank that gives up");
}

static void test_alone(void) {
    struct odd o = {.port = tap_free_port()};
    struct footprint was = footprint_now();
    struct epi_boot *boot = NULL;
    ok(join(&o, 1, 2, NULL, SHORT_NS, &boot) == EP_ERR_TIMEOUT && says("found no rank 0") &&
           says("127.0.0.1"),
       "no rank 0");
    ok(join(&o, 0, 3, NULL, SHORT_NS, &boot) == EP_ERR_TIMEOUT && says("missing: 1, 2"),
       "rank 0 alone");
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_port = htons((uint16_t)o.port)};
    addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (!ok(bind(fd, (struct sockaddr *)&addr, sizeof addr) == 0 && listen(fd, 8) == 0,
            "a program occupies the address")) {
        return;
    }
    ok(join(&o, 0, 2, NULL, LONG_NS, &boot) == EP_ERR_SYSTEM && says("in use") &&
           says("127.0.0.1") && says("EP_PORT"),
       "an address in use: what and what to do");
    ok(join(&o, 1, 2, NULL, SHORT_NS, &boot) == EP_ERR_TIMEOUT &&
           says("does not answer as rank"),
       "a program that is not rank 0");
    close(fd);
    ok(same_footprint(was), "nothing is left");
}

/* ---- worlds ---- */

static int world_rank(int rank, void *ctx) {
    ep_world *world = ctx;
    struct epi_boot_config config = {
        .rank = rank, .num_ranks = 4, .world = world, .timeout_ns = LONG_NS};
    struct epi_boot *boot[2] = {NULL, NULL};
    for (int i = 0; i < 2; i++) {
        ok(epi_boot_create(&boot[i], &config) == EP_OK, "create: %s", ep_last_error());
        ok(epi_boot_is_threads(boot[i]), "ranks are threads");
    }
    for (int i = 0; i < 2; i++) {
        check_group(boot[i], rank, 4);
    }
    char bytes[64] = {0};
    char all[4][64];
    ep_status st = epi_boot_allgather(boot[0], bytes, rank == 3 ? 8 : 16, all, in_time());
    ok(st == EP_ERR_MISMATCH && says("rank 3 gave 8"), "different sizes are found out");
    check_group(boot[0], rank, 4);
    if (rank != 2) {
        st = epi_boot_allgather(boot[1], bytes, 4, all, in_time());
        ok(st == EP_ERR_PEER && says("rank 2 has left"), "who left is named");
        st = epi_boot_allgather(boot[0], bytes, 4, all, epi_deadline_after(SHORT_NS));
        ok(st == EP_ERR_TIMEOUT && says("missing: 2"), "who is missing is named");
    } else {
        tap_sleep_ms(50);
        epi_boot_destroy(&boot[1]);
        tap_sleep_ms((int)(SHORT_NS / EPI_NS_PER_MS) + 500);
        st = epi_boot_allgather(boot[0], bytes, 4, all, in_time());
        ok(st == EP_OK, "late, but all had given their bytes");
    }
    check_group(boot[0], rank, 4); /* and the count of calls still agrees */
    epi_boot_destroy(&boot[1]);
    epi_boot_destroy(&boot[0]);
    return 0;
}

static int world_fail_rank(int rank, void *ctx) {
    ep_world *world = ctx;
    struct epi_boot_config config = {
        .rank = rank, .num_ranks = 3, .world = world, .timeout_ns = LONG_NS};
    struct epi_boot *boot = NULL;
    double start = tap_now();
    if (rank == 1) {
        config.num_ranks = 4;
        ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && says("the world has 3"),
           "a mistake");
    } else {
        ok(epi_boot_create(&boot, &config) == EP_ERR_PEER && says("rank 1 failed") &&
               says("the world has 3"),
           "the others learn of it");
    }
    ok(tap_now() - start < 10.0, "and do not wait");
    config.num_ranks = 3;
    ok(epi_boot_create(&boot, &config) == EP_OK, "the next attempt: %s", ep_last_error());
    epi_boot_destroy(&boot);
    return 0;
}

static int world_twice_rank(int rank, void *ctx) {
    struct epi_boot_config config = {
        .rank = 0, .num_ranks = 2, .world = ctx, .timeout_ns = 2 * SHORT_NS};
    struct epi_boot *boot = NULL;
    tap_sleep_ms(rank * 300);
    ep_status st = epi_boot_create(&boot, &config);
    if (rank == 0) {
        ok(st == EP_ERR_TIMEOUT && says("missing: 1"), "the first waits in vain");
    } else {
        ok(st == EP_ERR_MISMATCH && says("two threads"), "the second is told");
    }
    return 0;
}

static void test_world(void) {
    struct footprint was = footprint_now();
    ep_world *world = NULL;
    ok(ep_world_create(&world, 0) == EP_ERR_ARG && says("num_ranks is 0"), "no empty world");
    ok(ep_world_create(&world, EP_MAX_RANKS + 1) == EP_ERR_ARG, "nor one too large");
    ok(ep_world_create(NULL, 1) == EP_ERR_ARG && says("out"), "nor one for nobody");
    ok(ep_world_create(&world, 4) == EP_OK, "a world of 4");
    ok(tap_run_threads(4, world_rank, world) == 0, "4 threads meet");
    ep_world_destroy(&world);
    ok(world == NULL, "destroy clears the pointer");
    ep_world_destroy(&world);
    ep_world_destroy(NULL);
    ep_world_create(&world, 3);
    ok(tap_run_threads(3, world_fail_rank, world) == 0, "a rank that fails fails all at once");
    ep_world_destroy(&world);
    ep_world_create(&world, 2);
    ok(tap_run_threads(2, world_twice_rank, world) == 0, "a rank claimed twice");
    ep_world_destroy(&world);
    ok(same_footprint(was), "nothing is left");
}

/* ---- every allocation fails once ---- */

struct sweep {
    int port;
    int victim;
    pthread_barrier_t *barrier;
    int *done;
};

static int sweep_rank(int rank, void *ctx) {
    struct sweep *s = ctx;
    struct odd o = {.port = s->port};
    int num_failed = 0;
    for (int n = 1; !*s->done; n++) {
        char bytes[600] = {0};
        char all[1200];
        struct footprint was = footprint_now();
        struct epi_boot *boot = NULL;
        if (rank == s->victim) {
            put("EP_TEST_ALLOC_FAIL", (int)epi_alloc_count() + n);
        }
        uint64_t until = epi_alloc_count() + (uint64_t)n;
        ep_status st = join(&o, rank, 2, "sweep", 600 * EPI_NS_PER_MS, &boot);
        if (st == EP_OK) {
            st = epi_boot_allgather(boot, bytes, sizeof bytes, all,
                                    epi_deadline_after(600 * EPI_NS_PER_MS));
        }
        epi_boot_destroy(&boot);
        num_failed += st != EP_OK;
        ok(st == EP_OK || ep_last_error()[0] != '\0', "a failure has a text");
        ok(same_footprint(was), "%d: nothing is left after %s", n, ep_status_string(st));
        unsetenv("EP_TEST_ALLOC_FAIL");
        pthread_barrier_wait(s->barrier);
        if (rank == s->victim && epi_alloc_count() < until) {
            *s->done = 1; /* it had fewer than n allocations to make */
        }
        pthread_barrier_wait(s->barrier);
    }
    ok(num_failed >= 8, "%d of the failures were felt", num_failed);
    return 0;
}

static void test_sweep(void) {
    struct sweep s = {.barrier = tap_shared(sizeof *s.barrier)};
    pthread_barrierattr_t attr;
    pthread_barrierattr_init(&attr);
    pthread_barrierattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    tap_expect_log("dropped a connection");
    tap_expect_log(" died: ");
    for (s.victim = 0; s.victim < 2; s.victim++) {
        s.port = tap_free_port();
        s.done = tap_shared(sizeof *s.done);
        pthread_barrier_init(s.barrier, &attr, 2);
        ok(tap_spawn_ranks(2, sweep_rank, &s, 90) == 0, "any allocation of rank %d may fail",
           s.victim);
    }
}

static void *nothing(void *arg) {
    return arg;
}

int main(void) {
    gpu_never("how ranks meet");
    pthread_t thread;
    tap_deadline(300);
    /* A sanitizer starts a thread of its own with the first of ours: not in a footprint. */
    if (pthread_create(&thread, NULL, nothing, NULL) == 0) {
        pthread_join(thread, NULL);
    }
    test_node_lists();
    test_environment_errors();
    test_world();
    test_alone();
    test_processes();
    test_turned_away();
    test_sweep();
    return done_testing();
}
