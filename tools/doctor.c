/* SPDX-License-Identifier: MIT */
/*
 * `ep doctor`: what works on this machine, what is missing, what that costs, how to get it.
 *
 * Owns nothing that lasts. A mode is called working only after a dispatch and a combine whose
 * every value was checked; each runs in processes of its own, so that a crash is a finding.
 * Must not call a missing GPU or network a failure: the host backend needs neither.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "src/net/net.h"
#include "tools/bench.h"
#include "tools/doctor.h"

void doctor_add(struct doctor *d, const char *what, const char *state, const char *fmt, ...) {
    struct finding *f = &d->findings[d->num];
    if (d->num == MAX_FINDINGS) {
        return;
    }
    d->num++;
    f->what = what;
    f->state = state;
    va_list args;
    va_start(args, fmt);
    vsnprintf(f->text, sizeof(f->text), fmt, args);
    va_end(args);
}

/* A case of `ep bench` that is over at once: every row and every sum is checked. */
static bool try_mode(struct doctor *d, bool threads) {
    struct bench_params p = {.ranks = 4,
                             .tokens = 48,
                             .hidden = 32,
                             .topk = 3,
                             .experts = 10,
                             .groups = 1,
                             .topk_groups = 1,
                             .iters = 2,
                             .seed = 1,
                             .dtype = BENCH_F32,
                             .threads = threads};
    const char *what = threads ? "host mode, threads" : "host mode, processes";
    struct bench_case *c = NULL;
    int64_t start_ns = epi_now_ns();
    if (bench_case(&p, true, &c) != 0) {
        doctor_add(d, what, "broken", "%s", c && c->why[0] != '\0' ? c->why : "no memory");
        return false;
    }
    doctor_add(d, what, "ok",
               "4 ranks met, dispatched, combined and checked every value, in %s",
               text_ns((double)(epi_now_ns() - start_ns)).s);
    return true;
}

/* "ok" with the amount, or "low" with what that costs and the cure. */
static void add_amount(struct doctor *d, const char *what, double have, double enough,
                       const char *fmt, const char *cost) {
    char amount[64];
    snprintf(amount, sizeof(amount), have < 1e15 ? fmt : "no limit", have);
    doctor_add(d, what, have >= enough ? "ok" : "low", "%s%s%s", amount,
               have >= enough ? "" : "; ", have >= enough ? "" : cost);
}

/* ---- the machine ------------------------------------------------------------------------- */

static bool wait_for(struct pollfd *ready) {
    const struct epi_deadline limit = epi_deadline_after(EPI_NS_PER_S);
    int n;
    while ((n = poll(ready, 1, epi_deadline_left_ms(limit))) < 0 && errno == EINTR) {
    }
    return n > 0;
}

/* Whether a byte goes from one socket to another over this address, within a second. The kernel
 * fills in what it leaves open. */
static bool can_meet(struct sockaddr *at, socklen_t len, socklen_t room) {
    const int kind = SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK;
    const int listener = socket(at->sa_family, kind, 0);
    const int client = socket(at->sa_family, kind, 0);
    struct pollfd ready = {.fd = listener, .events = POLLIN};
    char byte = 'x';
    int served = -1;
    bool met = false;
    if (listener >= 0 && client >= 0 && bind(listener, at, len) == 0 &&
        listen(listener, 1) == 0 && getsockname(listener, at, &room) == 0 &&
        (connect(client, at, room) == 0 || errno == EINPROGRESS) && wait_for(&ready)) {
        served = accept(listener, NULL, NULL);
        ready.fd = served;
        met = served >= 0 && send(client, &byte, 1, MSG_NOSIGNAL) == 1 && wait_for(&ready) &&
              read(served, &byte, 1) == 1;
    }
    close(served);
    close(client);
    close(listener);
    return met;
}

static void check_meeting(struct doctor *d) {
    struct sockaddr_un local = {.sun_family =
                                    AF_UNIX}; /* an abstract one that the kernel names */
    struct sockaddr_in loopback = {.sin_family = AF_INET,
                                   .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (can_meet((struct sockaddr *)&local, sizeof(sa_family_t), sizeof(local))) {
        doctor_add(d, "Unix sockets", "ok", "processes of this host meet over abstract ones");
    } else {
        doctor_add(d, "Unix sockets", "missing",
                   "processes cannot meet, threads can; allow AF_UNIX sockets in the sandbox");
    }
    if (can_meet((struct sockaddr *)&loopback, sizeof(loopback), sizeof(loopback))) {
        doctor_add(d, "loopback TCP", "ok", "127.0.0.1 can be connected to");
    } else {
        doctor_add(
            d, "loopback TCP", "missing",
            "costs nothing where ranks know that all are on this host, as with `ep run`; "
            "bring the interface lo up");
    }
}

static void check_system(struct doctor *d) {
    int fd = memfd_create("ep-doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd >= 0 && ftruncate(fd, 4096) == 0 &&
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0) {
        doctor_add(d, "memfd with seals", "ok", "ranks share memory that no peer can truncate");
    } else {
        doctor_add(d, "memfd with seals", "missing",
                   "host ranks cannot share memory, neither as processes nor as threads; use "
                   "Linux 3.17 "
                   "or newer and allow memfd_create in the sandbox");
    }
    close(fd);
    fd = (int)syscall(SYS_pidfd_open, getpid(), 0);
    doctor_add(d, "pidfd", fd >= 0 ? "ok" : "missing",
               "not needed: this version sees a peer's death by its closed connection%s",
               fd >= 0 ? "" : " (Linux 5.3 or newer has it)");
    close(fd);
    check_meeting(d);
    struct rlimit files = {0}, procs = {0};
    getrlimit(RLIMIT_NOFILE, &files);
    getrlimit(RLIMIT_NPROC, &procs);
    add_amount(
        d, "open files", (double)files.rlim_cur, 1024, "%.0f allowed",
        "a rank needs a few per peer, so large groups fail to form; raise with ulimit -n");
    add_amount(d, "processes", (double)procs.rlim_cur, 256, "%.0f allowed, threads included",
               "large groups fail to start; raise with ulimit -u");
    add_amount(d, "cores", tool_num_cores(), 2, "%.0f", "ranks take turns: correct, but slow");
    struct epi_room room;
    epi_room(EPI_ROOM_SHARED, &room);
    const bool enough = room.bytes >= INT64_C(4000000000);
    doctor_add(d, "free memory", enough ? "ok" : "low", "%.1f GB, left by %s%s",
               (double)room.bytes / 1e9, room.limit,
               enough
                   ? ""
                   : "; 4 ranks of 4096 rows of 14 KB need about 4 GB; use fewer tokens or a "
                     "smaller max_recv_rows (ep_plan() gives the bytes)");
}

struct network_look {
    struct epi_net_found found[16];
    int num;
    char version[16], why[400];
};

static int look_at_network(struct rank *rank, void *arg) {
    struct network_look *look = arg;
    (void)rank;
    look->num =
        epi_net_find(look->found, sizeof(look->found) / sizeof(look->found[0]), look->version);
    snprintf(look->why, sizeof(look->why), "%s", look->num == 0 ? ep_last_error() : "");
    return 0;
}

/* What could carry rows between nodes, and why the rest could not. A child looks, because asking loads
 * whatever providers there are. */
static void check_network(struct doctor *d) {
    struct network_look *look = ranks_memory(sizeof(*look));
    struct ranks_job job = {.name = "ep doctor",
                            .num_ranks = 1,
                            .quiet = true,
                            .timeout_s = 60,
                            .fn = look_at_network,
                            .arg = look};
    if (!look || ranks_run(&job) != 0) {
        doctor_add(d, "libfabric", "broken",
                   "looking for its providers failed, perhaps in one of them (%s); "
                   "FI_PROVIDER=tcp leaves the others out",
                   look ? job.why : "no memory");
        return;
    }
    if (look->num == 0) {
        doctor_add(d, "libfabric", "missing",
                   "costs nothing in this version, which connects the ranks of one host: %s",
                   look->why);
        return;
    }
    doctor_add(d, "libfabric", "ok",
               "%s, from which later versions choose a provider to carry rows between hosts",
               look->version);
    for (int i = 0; i < look->num; i++) {
        const struct epi_net_found *f = &look->found[i];
        doctor_add(d, "network provider", f->why[0] ? "note" : "ok", "%s (%s) %s", f->name,
                   f->domains, f->why[0] ? f->why : "would be used");
    }
}

static void print_json(const struct doctor *d, bool works) {
    printf("{\"version\": \"%s\", \"works\": %s, \"findings\": [", text_version().s,
           works ? "true" : "false");
    for (int i = 0; i < d->num; i++) {
        printf("%s\n  {\"what\": ", i > 0 ? "," : "");
        text_json(stdout, d->findings[i].what);
        printf(", \"state\": ");
        text_json(stdout, d->findings[i].state);
        printf(", \"text\": ");
        text_json(stdout, d->findings[i].text);
        printf("}");
    }
    printf("\n]");
    doctor_gpu_json(d);
    printf("}\n");
}

int cmd_doctor(int argc, char **argv) {
    bool json = false;
    const struct opt opts[] = {{"json", 0, OPT_FLAG, &json, 0, 0, NULL, "as JSON"}};
    const struct command command = {
        .name = "ep doctor",
        .usage = "[--json]",
        .about =
            "Says what works on this machine, what is missing, what that costs and how to "
            "get it. Each mode is tried with a small checked dispatch and combine; GPUs also "
            "with copies between each two. The exit status is 0 if host ranks can work as "
            "processes or as threads.",
        .opts = opts,
        .num_opts = 1,
    };
    int status = args_parse(&command, argc, argv, NULL);
    if (status >= 0) {
        return status;
    }
    static struct doctor d; /* large */
    bool processes = try_mode(&d, false);
    bool threads = try_mode(&d, true);
    check_system(&d);
    doctor_gpu(&d);
    check_network(&d);
    if (json) {
        print_json(&d, processes || threads);
        return processes || threads ? 0 : 1;
    }
    struct utsname name = {0};
    uname(&name);
    printf("libep %s on %s %s, %s\n\n", text_version().s, name.sysname, name.release,
           name.machine);
    for (int i = 0; i < d.num; i++) {
        printf("  %-10s %-21s ", d.findings[i].state, d.findings[i].what);
        text_wrap(d.findings[i].text, 35);
    }
    doctor_gpu_print(&d);
    printf("\n%s\n",
           processes && threads ? "The host backend works; nothing here needs repair to use it."
           : processes || threads ? "The host backend works in part; see what is broken above."
                                  : "The host backend does not work here.");
    return processes || threads ? 0 : 1;
}
