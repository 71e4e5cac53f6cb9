/* SPDX-License-Identifier: MIT */
/* class: timed */
/*
 * What launchers say: who is believed where two speak, which jobs have one name and which never,
 * how addresses may be written; that a name nobody resolves does not outlast the deadline.
 */
#include <netdb.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "src/boot/parts.h"
#include "tests/gpu.h"
#include "tests/meet.h"
#include "tests/tap.h"

/* ---- the environment --------------------------------------------------------------------- */

static const char *const variables[] = {"RANK",
                                        "WORLD_SIZE",
                                        "LOCAL_RANK",
                                        "LOCAL_WORLD_SIZE",
                                        "MASTER_ADDR",
                                        "MASTER_PORT",
                                        "EP_JOB",
                                        "EP_PORT",
                                        "TORCHELASTIC_RUN_ID",
                                        "TORCHELASTIC_RESTART_COUNT",
                                        "OMPI_COMM_WORLD_RANK",
                                        "OMPI_COMM_WORLD_SIZE",
                                        "OMPI_COMM_WORLD_LOCAL_SIZE",
                                        "PMIX_RANK",
                                        "PMIX_NAMESPACE",
                                        "PMI_RANK",
                                        "PMI_SIZE",
                                        "PMI_JOBID",
                                        "MPI_LOCALNRANKS",
                                        "SLURM_PROCID",
                                        "SLURM_NTASKS",
                                        "SLURM_STEP_NUM_TASKS",
                                        "SLURM_JOB_ID",
                                        "SLURM_STEP_ID",
                                        "SLURM_NNODES",
                                        "SLURM_STEP_NODELIST"};

/* "A=1 B=2"; everything else that is read is unset. */
static void environment(const char *text) {
    char copy[600];
    char *rest = NULL;
    for (size_t i = 0; i < sizeof(variables) / sizeof(variables[0]); i++) {
        unsetenv(variables[i]);
    }
    snprintf(copy, sizeof(copy), "%s", text);
    for (char *word = strtok_r(copy, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
        char *value = strchr(word, '=');
        *value = '\0';
        setenv(word, value + 1, 1);
    }
}

static ep_status read_all(const char *text, const char *given, struct epi_job *job,
                          struct epi_launch *launch) {
    environment(text);
    EPI_TRY(epi_launch_job(given, job));
    return epi_launch_read(job, launch);
}

#define HERE " LOCAL_WORLD_SIZE=4 LOCAL_RANK=1"
#define OMPI "OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_SIZE=4 "
#define STEP                                                                                   \
    "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 SLURM_JOB_ID=7 SLURM_STEP_ID=1 SLURM_NNODES=2 "

static void test_who_is_believed(void) {
    static const struct {
        const char *what;
        const char *set;
        int rank; /* -1: refused, saying `says`; -2: the same, with a warning instead */
        int num_ranks;
        const char *says;
    } cases[] = {
        {"a pod's RANK around mpirun", "RANK=0 WORLD_SIZE=1 MASTER_ADDR=pod " OMPI, -1, 0,
         "RANK=0 and WORLD_SIZE=1 say that this is rank 0 of 1, but OMPI_COMM_WORLD_RANK=2"},
        {"a pod's RANK around mpiexec", "RANK=0 WORLD_SIZE=1 PMI_RANK=1 PMI_SIZE=2", -1, 0,
         "PMI_RANK=1 and PMI_SIZE=2 say rank 1 of 2"},
        {"a pod's RANK around srun", "RANK=0 WORLD_SIZE=1 " STEP, -1, 0, "SLURM_PROCID=0"},
        {"the number of hosts as WORLD_SIZE", "RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=8", -1, 0,
         "LOCAL_WORLD_SIZE=8"},
        {"RANK made of mpirun's", "RANK=2 WORLD_SIZE=4 " OMPI, 2, 4, NULL},
        {"torchrun in each of srun's tasks",
         "RANK=5 WORLD_SIZE=8 MASTER_ADDR=n1 MASTER_PORT=29500" HERE " " STEP, 5, 8, NULL},
        {"ranks started by each of mpirun's",
         "RANK=5 WORLD_SIZE=8 MASTER_ADDR=n1 MASTER_PORT=29500 " OMPI, 5, 8, NULL},
        {"a launcher's ranks that are a part of mpirun's",
         "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 " OMPI, 1, 2, NULL},
        {"ranks by hand that are a part of mpirun's",
         "RANK=1 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 " OMPI, 1, 2, "are believed"},
        {"mpirun's ranks within srun's daemons", OMPI STEP, 2, 4, NULL},
        {"mpiexec's ranks within srun's daemons",
         "PMI_RANK=3 PMI_SIZE=4 MPI_LOCALNRANKS=4 " STEP, 3, 4, NULL},
        {"the same where srun speaks PMIx",
         "PMI_RANK=3 PMI_SIZE=4 MPI_LOCALNRANKS=4 PMIX_RANK=0 "
         "PMIX_NAMESPACE=slurm.pmix.7.1 " STEP,
         3, 4, NULL},
        {"mpirun's ranks where srun speaks PMI",
         OMPI "PMI_RANK=0 PMI_SIZE=2 PMI_JOBID=7.1 " STEP, 2, 4, NULL},
        {"two launchers that are not srun", OMPI "PMI_RANK=1 PMI_SIZE=2", -1, 0,
         "unset those that are not about this process"},
        {"srun alone", STEP "SLURM_STEP_NODELIST=n[1-2]", 0, 2, NULL},
    };
    struct epi_job job;
    struct epi_launch l;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const bool warns = cases[i].says && cases[i].rank >= 0;
        if (warns) {
            tap_expect_log(cases[i].says);
        }
        ep_status st = read_all(cases[i].set, NULL, &job, &l);
        if (cases[i].rank < 0) {
            ok(st == EP_ERR_ARG && meet_says(cases[i].says), "refused: %s", cases[i].what);
        } else {
            ok(st == EP_OK && l.rank == cases[i].rank && l.num_ranks == cases[i].num_ranks,
               "rank %d of %d: %s (%s)", cases[i].rank, cases[i].num_ranks, cases[i].what,
               ep_last_error());
        }
    }
}

static void test_where_ranks_are(void) {
    static const struct {
        const char *set;
        bool is_local;
        const char *host;
        int port;
    } cases[] = {
        {"RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=no-such-host.invalid "
         "MASTER_PORT=500",
         true, "127.0.0.1", 501},
        {"RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=1 MASTER_ADDR=n1 MASTER_PORT=500", false, "n1",
         501},
        {"RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=500", true, "localhost", 501},
        {"RANK=0 WORLD_SIZE=2 MASTER_ADDR=[::1] MASTER_PORT=500", true, "::1", 501},
        {"RANK=0 WORLD_SIZE=2 MASTER_ADDR=tcp://n1:600", false, "n1", 601},
        {"RANK=0 WORLD_SIZE=2 MASTER_ADDR=n1:600 MASTER_PORT=600", false, "n1", 601},
        {"RANK=0 WORLD_SIZE=2 MASTER_ADDR=n1 MASTER_PORT=65535 EP_PORT=9", false, "n1", 9},
        {OMPI "MASTER_ADDR=n1 MASTER_PORT=500", true, "127.0.0.1", 501},
        {"OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_SIZE=2 "
         "LOCAL_WORLD_SIZE=4 MASTER_ADDR=n1 MASTER_PORT=500",
         false, "n1", 501},
        {STEP "SLURM_STEP_NODELIST=n[1-2] EP_PORT=9", false, "n1", 9},
    };
    struct epi_job job;
    struct epi_launch l;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        ep_status st = read_all(cases[i].set, NULL, &job, &l);
        ok(st == EP_OK && l.is_local == cases[i].is_local &&
               strcmp(l.host, cases[i].host) == 0 && l.ports[0] == cases[i].port,
           "%s: %s:%d%s", cases[i].set, l.host, l.ports[0], l.is_local ? ", all here" : "");
    }
    read_all("RANK=0 WORLD_SIZE=2 MASTER_ADDR=n1 MASTER_PORT=65535", NULL, &job, &l);
    bool good = l.num_ports == EPI_LAUNCH_MAX_PORTS;
    for (int i = 0; i < l.num_ports; i++) {
        good = good && l.ports[i] >= 1024 && l.ports[i] < 65535;
    }
    ok(good, "no port follows the last one, but others are derived from the job");
    ok(read_all("RANK=0 WORLD_SIZE=2 MASTER_ADDR=n1:600 MASTER_PORT=500", NULL, &job, &l) ==
               EP_ERR_ARG &&
           meet_says("MASTER_PORT=500"),
       "two ports");
    ok(read_all("RANK=0 WORLD_SIZE=2 MASTER_ADDR=udp://n1", NULL, &job, &l) == EP_ERR_ARG &&
           meet_says("udp://n1"),
       "what no rank can come to is refused at once");
}

/* ---- addresses --------------------------------------------------------------------------- */

static void test_addresses(void) {
    static const struct {
        const char *text;
        const char *host; /* NULL: refused */
        int port;
    } cases[] = {
        {"node1", "node1", 0},
        {" 127.0.0.1 ", "127.0.0.1", 0},
        {"127.0.0.1:5", "127.0.0.1", 5},
        {"\tnode1.example.org:65535\n", "node1.example.org", 65535},
        {"[::1]", "::1", 0},
        {"[::1]:5", "::1", 5},
        {"::1", "::1", 0},
        {"::1:5", "::1:5", 0},
        {"fe80::1%eth0", "fe80::1%eth0", 0},
        {"::ffff:127.0.0.1", "::ffff:127.0.0.1", 0},
        {"TCP://node1:5/", "node1", 5},
        {"tcp://[::1]:5", "::1", 5},
        {"", NULL, 0},
        {"  ", NULL, 0},
        {":5", NULL, 0},
        {"node1:", NULL, 0},
        {"node1:0", NULL, 0},
        {"node1:65536", NULL, 0},
        {"node1:5x", NULL, 0},
        {"node1: 5", NULL, 0},
        {"node1:+5", NULL, 0},
        {"node 1", NULL, 0},
        {"env://", NULL, 0},
        {"http://node1", NULL, 0},
        {"file:///tmp/x", NULL, 0},
        {"tcp://", NULL, 0},
        {"node1/path", NULL, 0},
        {"\"node1\"", NULL, 0},
        {"[::1", NULL, 0},
        {"[]", NULL, 0},
        {"[::1]x", NULL, 0},
        {"[::1]:", NULL, 0},
        {"::g", NULL, 0},
        {"1:2:3", NULL, 0},
        {"224.0.0.1", NULL, 0},
        {"255.255.255.255", NULL, 0},
        {"ff02::1", NULL, 0},
    };
    char host[256];
    int port;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const char *why = epi_addr_parse(cases[i].text, host, &port);
        const bool good =
            cases[i].host ? !why && strcmp(host, cases[i].host) == 0 && port == cases[i].port
                          : why != NULL;
        ok(good, "\"%s\": %s", cases[i].text, why ? why : host);
    }
    char longest[400];
    memset(longest, 'a', sizeof(longest));
    longest[255] = '\0';
    ok(!epi_addr_parse(longest, host, &port) && strcmp(host, longest) == 0, "255 characters");
    longest[255] = 'a';
    longest[256] = '\0';
    ok(epi_addr_parse(longest, host, &port) != NULL, "256 are too many");
    static const char *const here[] = {"localhost", "LocalHost", "127.0.0.1",
                                       "127.8.9.1", "::1",       "::ffff:127.0.0.1",
                                       "0.0.0.0",   "::"};
    static const char *const elsewhere[] = {"10.0.0.1", "localhost.example.org", "::2", "n1"};
    for (size_t i = 0; i < sizeof(here) / sizeof(here[0]); i++) {
        ok(epi_addr_is_loopback(here[i]), "%s is this host", here[i]);
    }
    for (size_t i = 0; i < sizeof(elsewhere) / sizeof(elsewhere[0]); i++) {
        ok(!epi_addr_is_loopback(elsewhere[i]), "%s need not be", elsewhere[i]);
    }
}

static void test_node_lists(void) {
    enum { BYTES = 120000 };
    char host[256];
    char *list = malloc(BYTES + 1);
    for (int i = 0; i < BYTES; i++) {
        list[i] = "[1]"[i % 3];
    }
    list[BYTES] = '\0';
    ok(!epi_launch_first_host(list, host, sizeof(host)), "a list of 40000 brackets");
    list[3 * 255] = '\0';
    ok(epi_launch_first_host(list, host, sizeof(host)) && strlen(host) == 255,
       "as many as fit");
    list[3 * 255] = '[';
    list[3 * 256] = '\0';
    ok(!epi_launch_first_host(list, host, sizeof(host)), "one too many");
    memset(list, '[', BYTES);
    ok(!epi_launch_first_host(list, host, sizeof(host)), "brackets alone");
    free(list);
}

/* ---- the names of jobs ------------------------------------------------------------------- */

static uint64_t job_id(const char *set, const char *given) {
    struct epi_job job;
    struct epi_launch l;
    ep_status st = read_all(set, given, &job, &l);
    ok(st == EP_OK && job.is_named, "%s: named by %s%s", set, job.from,
       st == EP_OK ? "" : ep_last_error());
    return job.id;
}

#define TORCH "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=500 "

static void test_names(void) {
    struct epi_job job;
    struct epi_launch l;
    char longest[300];
    uint64_t a = job_id(TORCH "TORCHELASTIC_RUN_ID=a", NULL);
    ok(a == job_id(TORCH "TORCHELASTIC_RUN_ID=a", NULL), "one id, one name");
    ok(a != job_id(TORCH "TORCHELASTIC_RUN_ID=b", NULL), "two ids, two names");
    ok(a != job_id(TORCH "TORCHELASTIC_RUN_ID=a TORCHELASTIC_RESTART_COUNT=1", NULL),
       "a restarted job is another");
    ok(a != job_id(TORCH "TORCHELASTIC_RUN_ID=a", "x"), "the caller's name tells groups apart");
    ok(job_id(TORCH "TORCHELASTIC_RUN_ID=a", "x") != job_id(TORCH "TORCHELASTIC_RUN_ID=b", "x"),
       "and does not join jobs of two launchers");
    ok(job_id(TORCH "EP_JOB=x", NULL) ==
           job_id("EP_JOB=x RANK=0 WORLD_SIZE=2 MASTER_ADDR=::1", NULL),
       "EP_JOB is enough");
    environment("EP_JOB=x");
    ok(epi_launch_job(NULL, &job) == EP_OK, "at an address");
    a = job.id;
    ok(epi_launch_job("x", &job) == EP_OK && a == job.id, "it is the caller's or EP_JOB");
    ok(job_id(OMPI "PMIX_NAMESPACE=5", NULL) != job_id(OMPI "PMIX_NAMESPACE=6", NULL),
       "Open MPI");
    ok(job_id(STEP "SLURM_STEP_NODELIST=n1", NULL) !=
           job_id("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 SLURM_JOB_ID=7 SLURM_STEP_ID=2 "
                  "SLURM_STEP_NODELIST=n1",
                  NULL),
       "two steps of a Slurm job");
    memset(longest, 'a', sizeof(longest));
    longest[201] = '\0';
    ok(epi_launch_job(longest, &job) == EP_ERR_ARG && meet_says("201 characters"),
       "a name that is too long is an error");
    longest[200] = '\0';
    ok(epi_launch_job(longest, &job) == EP_OK, "200 are not");
    ok(epi_launch_job("", &job) == EP_ERR_ARG, "none are");
    longest[200] = 'a';
    environment(TORCH);
    setenv("EP_JOB", longest, 1);
    ok(epi_launch_job(NULL, &job) == EP_ERR_ARG && meet_says("EP_JOB"), "EP_JOB, too");
    environment(TORCH);
    memset(longest, 'b', sizeof(longest));
    longest[299] = '\0';
    setenv("TORCHELASTIC_RUN_ID", longest, 1);
    ok(epi_launch_job(NULL, &job) == EP_OK && epi_launch_read(&job, &l) == EP_OK,
       "a launcher's may be long");
}

/* ---- jobs without a name ----------------------------------------------------------------- */

struct families {
    const char *set;
    uint64_t id[2][2];
};

static void child_names(struct families *f, int family, int child) {
    struct epi_job job;
    struct epi_launch l;
    if (read_all(f->set, NULL, &job, &l) == EP_OK && strstr(l.note, "EP_JOB")) {
        f->id[family][child] = job.id;
    }
}

/* Two processes that start two each: as the parents of ranks do. */
static void test_two_starters(const char *what, const char *set) {
    struct families *f = tap_shared(sizeof(*f));
    f->set = set;
    for (int family = 0; family < 2; family++) {
        pid_t parent = fork();
        if (parent > 0) {
            waitpid(parent, NULL, 0);
            continue;
        }
        for (int child = 0; child < 2; child++) {
            pid_t pid = fork();
            if (pid == 0) {
                child_names(f, family, child);
                _exit(0);
            }
            waitpid(pid, NULL, 0);
        }
        _exit(0);
    }
    ok(f->id[0][0] && f->id[0][0] == f->id[0][1] && f->id[1][0] == f->id[1][1],
       "%s: what one process starts is one job", what);
    ok(f->id[0][0] != f->id[1][0], "%s: what two start are two", what);
}

static pid_t start_as_rank(const char *rank) {
    pid_t pid = fork();
    if (pid == 0) {
        environment("WORLD_SIZE=3 MASTER_PORT=500 MASTER_ADDR=127.0.0.1");
        setenv("RANK", rank, 1);
        execl("/proc/self/exe", "t_launch", "idle", (char *)NULL);
        _exit(1);
    }
    return pid;
}

/* This process starts ranks as a script does; a child of it looks whether there are too many. */
static ep_status census(void) {
    struct epi_job job;
    struct epi_launch l;
    int status = 0;
    pid_t pid = fork();
    if (pid == 0) {
        ep_status st = read_all("RANK=0 WORLD_SIZE=3 MASTER_PORT=500 MASTER_ADDR=127.0.0.1",
                                NULL, &job, &l);
        st = st == EP_OK ? epi_launch_check(&l) : st;
        _exit(st == EP_ERR_MISMATCH && !meet_says("started as rank 1 of 3") ? 99 : -st);
    }
    waitpid(pid, &status, 0);
    return (ep_status)-WEXITSTATUS(status);
}

static bool has_become(pid_t pid) {
    char path[64];
    char text[64] = "";
    snprintf(path, sizeof(path), "/proc/%d/cmdline", (int)pid);
    for (int i = 0; i < 1000 && strcmp(text, "t_launch") != 0; i++) {
        FILE *f = fopen(path, "r");
        size_t n = f ? fread(text, 1, sizeof(text) - 1, f) : 0;
        text[n] = '\0';
        if (f) {
            fclose(f);
        }
        tap_sleep_ms(10);
    }
    return strcmp(text, "t_launch") == 0;
}

static void test_left_over(void) {
    pid_t ranks[3];
    ranks[0] = start_as_rank("1");
    ranks[1] = start_as_rank("2");
    ok(has_become(ranks[0]) && has_become(ranks[1]) && census() == EP_OK, "one process a rank");
    ranks[2] = start_as_rank("1");
    ok(has_become(ranks[2]) && census() == EP_ERR_MISMATCH,
       "of two that were started as one rank, one is of another job: nobody is believed");
    for (int i = 0; i < 3; i++) {
        kill(ranks[i], SIGKILL);
        waitpid(ranks[i], NULL, 0);
    }
    ok(census() == EP_OK, "they have ended");
}

/* ---- a name server that does not answer --------------------------------------------------- */

static atomic_int slow_lookups;

/* In place of the library's: names that begin with "slow" take a second, "never" is no name. */
int getaddrinfo(const char *host, const char *service, const struct addrinfo *hints,
                struct addrinfo **out) {
    (void)service;
    const bool is_literal = host[strspn(host, "0123456789.:")] == '\0';
    if (hints->ai_flags & AI_NUMERICHOST ? !is_literal : strncmp(host, "slow", 4) != 0) {
        return EAI_NONAME;
    }
    if (!is_literal) {
        tap_sleep_ms(1000);
        slow_lookups++;
    }
    struct sockaddr_in *in = calloc(1, sizeof(*in) + sizeof(struct addrinfo));
    struct addrinfo *ai = (struct addrinfo *)(in + 1);
    in->sin_family = AF_INET;
    in->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    *ai = (struct addrinfo){.ai_family = AF_INET, .ai_addrlen = sizeof(*in)};
    ai->ai_addr = (struct sockaddr *)in;
    *out = ai;
    return 0;
}

void freeaddrinfo(struct addrinfo *list) {
    free(list->ai_addr);
}

static ep_status meet_alone(const char *set, int64_t timeout_ns) {
    struct epi_boot *boot = NULL;
    struct epi_boot_config config = {.rank = -1, .num_ranks = -1, .timeout_ns = timeout_ns};
    environment(set);
    return epi_boot_create(&boot, &config);
}

static void test_resolution(void) {
    struct epi_addr addr;
    bool is_name = false;
    int num = 0;
    const int64_t soon_ns = 100 * EPI_NS_PER_MS;
    double start = tap_now();
    const char *why =
        epi_addr_resolve("slow.test", 1, epi_deadline_after(soon_ns), &addr, 1, &num, &is_name);
    ok(why && strstr(why, "does not answer") && slow_lookups == 0 && tap_now() - start < 0.9,
       "a name server is not waited for beyond the deadline");
    why = epi_addr_resolve("slow.test", 1, epi_deadline_after(20 * EPI_NS_PER_S), &addr, 1,
                           &num, &is_name);
    ok(!why && num == 1 && is_name && slow_lookups >= 1, "but as long as that");
    why = epi_addr_resolve("never.test", 1, epi_deadline_never(), &addr, 1, &num, &is_name);
    ok(why && is_name, "no such name: %s", why ? why : "");
    tap_sleep_ms(100); /* the first lookup has ended: its memory is back, or a leak is found */
    static const char set[] = "WORLD_SIZE=2 MASTER_ADDR=never.test MASTER_PORT=500 RANK=";
    char text[100];
    for (int rank = 0; rank < 2; rank++) {
        snprintf(text, sizeof(text), "%s%d", set, rank);
        ok(meet_alone(text, 3 * EPI_NS_PER_S / 2) == EP_ERR_TIMEOUT &&
               meet_says("never.test") && meet_says("cannot be resolved"),
           "rank %d says so: %s", rank, ep_last_error());
    }
    ok(meet_alone("PMI_RANK=1 PMI_SIZE=2 MPI_LOCALNRANKS=2", EPI_NS_PER_S / 5) ==
               EP_ERR_TIMEOUT &&
           meet_says("names no job") && meet_says("EP_JOB"),
       "who waits in vain in a job without a name is told what to set: %s", ep_last_error());
}

/* ---- ranks that fail, and ranks that are left over ---------------------------------------- */

/* Process 0 is a rank 0 that was left over, 1 and 2 are the next job, which differs in nothing. */
static int newer_rank(int number, void *ctx) {
    static const char second[] = "RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=500 ";
    static const char *const set[] = {TORCH, TORCH, second};
    struct epi_boot *boot = NULL;
    struct epi_boot_config config = {.rank = -1, .num_ranks = -1, .timeout_ns = MEET_LONG_NS};
    (void)ctx;
    environment(set[number]);
    tap_sleep_ms(400 * number);
    ep_status st = epi_boot_create(&boot, &config);
    if (number == 0) {
        ok(st == EP_ERR_MISMATCH && meet_says("gives way"), "the older is told: %s",
           ep_last_error());
    } else {
        ok(st == EP_OK, "the newer meet: %s", ep_last_error());
        meet_check_group(boot, number - 1, 2);
    }
    epi_boot_destroy(&boot);
    return 0;
}

static int unknown_rank(int rank, void *ctx) {
    ep_world *world = ctx;
    char address[32] = "127.0.0.1:500";
    struct epi_boot *boot = NULL;
    struct epi_boot_config config = {.rank = rank == 1 ? 7 : rank,
                                     .num_ranks = 3,
                                     .world = world,
                                     .address = world ? NULL : address,
                                     .timeout_ns = MEET_LONG_NS};
    double start = tap_now();
    tap_sleep_ms(rank == 2 ? 300 : 0); /* it comes when the others have failed already */
    ep_status st = epi_boot_create(&boot, &config);
    ok(st == (rank == 1 ? EP_ERR_ARG : EP_ERR_PEER) && meet_says("rank is 7"), "rank %d: %s",
       rank, ep_last_error());
    ok(tap_now() - start < (double)MEET_LONG_NS / 2e9, "and nobody waits");
    return 0;
}

static void test_failing_ranks(void) {
    ep_world *world = NULL;
    tap_expect_log("rendezvous: dropped"); /* who looked who is there */
    tap_expect_log("rendezvous: turned away");
    ok(tap_spawn_ranks(3, newer_rank, NULL, 60) == 0, "a rank 0 that was left over gives way");
    ok(tap_spawn_ranks(3, unknown_rank, NULL, 60) == 0, "a process with a rank that is none");
    ep_world_create(&world, 3);
    ok(tap_run_threads(3, unknown_rank, world) == 0, "a thread with a rank that is none");
    ep_world_destroy(&world);
}

/* ---- for t_mpi.sh ------------------------------------------------------------------------- */

/* A rank by whatever launcher: whose ranks has it met, by the variable JOB? */
static int be_rank(void) {
    struct epi_boot *boot = NULL;
    struct epi_boot_config config = {
        .rank = -1, .num_ranks = -1, .timeout_ns = 20 * EPI_NS_PER_S};
    char all[64] = "";
    const char *job = getenv("JOB");
    if (epi_boot_create(&boot, &config) != EP_OK) {
        printf("failed: %s\n", ep_last_error());
        return 1;
    }
    ep_status st = epi_boot_allgather(boot, job ? job : "?", 1, all, meet_in_time());
    printf("job %s rank %d of %d: %s\n", job, epi_boot_rank(boot), epi_boot_num_ranks(boot),
           st == EP_OK ? all : ep_last_error());
    st = st == EP_OK ? epi_boot_barrier(boot, meet_in_time()) : st;
    epi_boot_destroy(&boot);
    return st != EP_OK;
}

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "idle") == 0) {
        alarm(60);
        pause();
        return 0;
    }
    if (argc > 1 && strcmp(argv[1], "rank") == 0) {
        return be_rank();
    }
    gpu_never("what launchers say");
    tap_deadline(60);
    test_who_is_believed();
    test_where_ranks_are();
    test_addresses();
    test_node_lists();
    test_names();
    test_two_starters("MPICH", "PMI_RANK=0 PMI_SIZE=2 MPI_LOCALNRANKS=2");
    test_two_starters("by hand", TORCH);
    test_two_starters("torchrun's static rendezvous",
                      TORCH "LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 TORCHELASTIC_RUN_ID=none");
    test_left_over();
    test_failing_ranks();
    test_resolution();
    return done_testing();
}
