/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * How ranks meet: as threads of a world, by the caller's allgather, at an address, and as the
 * environment of each launcher says; that nothing is left.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "src/boot/parts.h"
#include "tests/gpu.h"
#include "tests/meet.h"
#include "tests/rig.h"
#include "tests/tap.h"

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
    struct rig_footprint was = rig_footprint();
    char address[32];
    char text[16];
    struct epi_boot *boot = NULL;
    struct epi_boot_config config = meet_config(address, m->port, rank, m->num_ranks);
    if (m->barrier) {
        snprintf(text, sizeof(text), "%d", rank);
        setenv("TEST_RANK", text, 1);
        config.address = NULL;
        config.allgather = allgather;
        config.allgather_ctx = m;
    } else if (m->set_env) {
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
        meet_check_group(boot, rank, m->num_ranks);
        epi_boot_destroy(&boot);
        ok(!boot, "destroy clears the pointer");
    }
    ok(rig_same_footprint(was), "nothing is left");
    return 0;
}

static void put(const char *name, int value) {
    char text[16];
    snprintf(text, sizeof(text), "%d", value);
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
    for (size_t i = 0; i < sizeof(launchers) / sizeof(launchers[0]); i++) {
        m.port = tap_free_port() + 1;
        m.set_env = launchers[i].set_env;
        ok(tap_spawn_ranks(3, meet_rank, &m, 60) == 0, "environment: %s", launchers[i].name);
    }
    m.set_env = NULL;
    m.barrier = tap_shared(sizeof(*m.barrier));
    m.cards = tap_shared(1 << 16);
    pthread_barrierattr_t attr;
    pthread_barrierattr_init(&attr);
    pthread_barrierattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(m.barrier, &attr, 3);
    ok(tap_spawn_ranks(3, meet_rank, &m, 60) == 0, "the caller's allgather");
}

static void test_environment_errors(void) {
    struct epi_boot *boot = NULL;
    struct epi_boot_config config = {.rank = -1, .num_ranks = -1, .timeout_ns = MEET_SHORT_NS};
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && meet_says("ep run") &&
           meet_says("WORLD_SIZE"),
       "no environment: the message says what to do");
    setenv("RANK", "1", 1);
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && meet_says("RANK is set"),
       "half of one");
    setenv("WORLD_SIZE", "2", 1);
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && meet_says("MASTER_ADDR"),
       "no MASTER_ADDR");
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    setenv("RANK", "2", 1);
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && meet_says("RANK=\"2\"") &&
           meet_says("0..1"),
       "a rank out of range");
    setenv("RANK", "1x", 1);
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && meet_says("1x"),
       "a rank that is no number");
    setenv("RANK", "1", 1);
    setenv("MASTER_PORT", "65536", 1);
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && meet_says("65535"),
       "no port above the last");
    static const char *const names[] = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"};
    for (size_t i = 0; i < 4; i++) {
        unsetenv(names[i]);
    }
    setenv("SLURM_PROCID", "0", 1);
    setenv("SLURM_NTASKS", "8", 1);
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && meet_says("SLURM_PROCID"),
       "a Slurm batch script is not a rank");
    unsetenv("SLURM_PROCID");
    unsetenv("SLURM_NTASKS");
    config.rank = 0;
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && meet_says("must be -1"),
       "half a config");
    static const char *const bad[] = {"host",       "host:", ":5",     "host:0",
                                      "host:65536", "::1:5", "[::1:5", "host:5x"};
    config.num_ranks = 2;
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        config.address = bad[i];
        ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && meet_says(bad[i]), "address %s",
           bad[i]);
    }
    config.address = "127.0.0.1:5";
    config.rank = 2;
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && meet_says("rank is 2"), "rank 2 of 2");
    config.num_ranks = EP_MAX_RANKS + 1;
    ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && meet_says("1025"), "too many ranks");
}

static void test_node_lists(void) {
    static const char *const lists[][2] = {
        {"node03", "node03"},           {"node03,node04", "node03"},
        {"node[03-07,9]", "node03"},    {"gpu-a[7]", "gpu-a7"},
        {"n[1-2]r[3-4],x", "n1r3"},     {"a[1,2].cluster.org", "a1.cluster.org"},
        {"10.0.0.[12-15]", "10.0.0.12"}};
    char host[64];
    for (size_t i = 0; i < sizeof(lists) / sizeof(lists[0]); i++) {
        bool good = epi_launch_first_host(lists[i][0], host, sizeof(host));
        ok(good && strcmp(host, lists[i][1]) == 0, "first host of %s", lists[i][0]);
    }
    ok(!epi_launch_first_host("", host, sizeof(host)), "an empty list");
    ok(!epi_launch_first_host("n[1-2", host, sizeof(host)), "a broken list");
    ok(!epi_launch_first_host("a-long-name", host, 5), "a name that does not fit");
}

/* ---- worlds ---- */

static int world_rank(int rank, void *ctx) {
    ep_world *world = ctx;
    struct epi_boot_config config = {
        .rank = rank, .num_ranks = 4, .world = world, .timeout_ns = MEET_LONG_NS};
    struct epi_boot *boot[2] = {NULL, NULL};
    for (int i = 0; i < 2; i++) {
        ok(epi_boot_create(&boot[i], &config) == EP_OK, "create: %s", ep_last_error());
        ok(epi_boot_is_threads(boot[i]), "ranks are threads");
    }
    for (int i = 0; i < 2; i++) {
        meet_check_group(boot[i], rank, 4);
    }
    char bytes[64] = {0};
    char all[4][64];
    ep_status st = epi_boot_allgather(boot[0], bytes, rank == 3 ? 8 : 16, all, meet_in_time());
    ok(st == EP_ERR_MISMATCH && meet_says("rank 3 gave 8"), "different sizes are found out");
    meet_check_group(boot[0], rank, 4);
    if (rank != 2) {
        st = epi_boot_allgather(boot[1], bytes, 4, all, meet_in_time());
        ok(st == EP_ERR_PEER && meet_says("rank 2 has left"), "who left is named");
        st = epi_boot_allgather(boot[0], bytes, 4, all, epi_deadline_after(MEET_SHORT_NS));
        ok(st == EP_ERR_TIMEOUT && meet_says("missing: 2"), "who is missing is named");
    } else {
        tap_sleep_ms(50);
        epi_boot_destroy(&boot[1]);
        tap_sleep_ms((int)(MEET_SHORT_NS / EPI_NS_PER_MS) + 500);
        st = epi_boot_allgather(boot[0], bytes, 4, all, meet_in_time());
        ok(st == EP_OK, "late, but all had given their bytes");
    }
    meet_check_group(boot[0], rank, 4); /* and the count of calls still agrees */
    epi_boot_destroy(&boot[1]);
    epi_boot_destroy(&boot[0]);
    return 0;
}

static int world_fail_rank(int rank, void *ctx) {
    ep_world *world = ctx;
    struct epi_boot_config config = {
        .rank = rank, .num_ranks = 3, .world = world, .timeout_ns = MEET_LONG_NS};
    struct epi_boot *boot = NULL;
    double start = tap_now();
    if (rank == 1) {
        config.num_ranks = 4;
        ok(epi_boot_create(&boot, &config) == EP_ERR_ARG && meet_says("the world has 3"),
           "a mistake");
    } else {
        ok(epi_boot_create(&boot, &config) == EP_ERR_PEER && meet_says("rank 1 failed") &&
               meet_says("the world has 3"),
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
        .rank = 0, .num_ranks = 2, .world = ctx, .timeout_ns = 2 * MEET_SHORT_NS};
    struct epi_boot *boot = NULL;
    tap_sleep_ms(rank * 300);
    ep_status st = epi_boot_create(&boot, &config);
    if (rank == 0) {
        ok(st == EP_ERR_TIMEOUT && meet_says("missing: 1"), "the first waits in vain");
    } else {
        ok(st == EP_ERR_MISMATCH && meet_says("two threads"), "the second is told");
    }
    return 0;
}

static void test_world(void) {
    struct rig_footprint was = rig_footprint();
    ep_world *world = NULL;
    ok(ep_world_create(&world, 0) == EP_ERR_ARG && meet_says("num_ranks is 0"),
       "no empty world");
    ok(ep_world_create(&world, EP_MAX_RANKS + 1) == EP_ERR_ARG, "nor one too large");
    ok(ep_world_create(NULL, 1) == EP_ERR_ARG && meet_says("out"), "nor one for nobody");
    ok(ep_world_create(&world, 4) == EP_OK, "a world of 4");
    ok(tap_run_threads(4, world_rank, world) == 0, "4 threads meet");
    ep_world_destroy(&world);
    ok(!world, "destroy clears the pointer");
    ep_world_destroy(&world);
    ep_world_destroy(NULL);
    ep_world_create(&world, 3);
    ok(tap_run_threads(3, world_fail_rank, world) == 0, "a rank that fails fails all at once");
    ep_world_destroy(&world);
    ep_world_create(&world, 2);
    ok(tap_run_threads(2, world_twice_rank, world) == 0, "a rank claimed twice");
    ep_world_destroy(&world);
    ok(rig_same_footprint(was), "nothing is left");
}

int main(void) {
    gpu_never("how ranks meet");
    tap_deadline(100);
    test_node_lists();
    test_environment_errors();
    test_world();
    test_processes();
    return done_testing();
}
