/* SPDX-License-Identifier: MIT */
/* class: rest */
/*
 * src/base: status names and error text, knobs and their malformed values, deadlines, the
 * allocation injector, threads that leave signals alone, and what the log writes.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "src/base/base.h"
#include "tests/gpu.h"
#include "tests/tap.h"

/* What is written to stderr while capturing; a pipe holds far more than these tests write. */
static int saved_stderr = -1;
static int capture_fd = -1;

static void capture_begin(void) {
    int ends[2];
    if (pipe(ends) != 0) {
        exit(1);
    }
    saved_stderr = dup(STDERR_FILENO);
    dup2(ends[1], STDERR_FILENO);
    close(ends[1]);
    capture_fd = ends[0];
    fcntl(capture_fd, F_SETFL, O_NONBLOCK);
}

static void capture_end(char *out, size_t bytes) {
    dup2(saved_stderr, STDERR_FILENO);
    close(saved_stderr);
    ssize_t n = read(capture_fd, out, bytes - 1);
    out[n > 0 ? n : 0] = '\0';
    close(capture_fd);
}

static int count(const char *text, const char *what) {
    int num = 0;
    while ((text = strstr(text, what)) != NULL) {
        num++;
        text++;
    }
    return num;
}

static void test_status(void) {
    ok(strcmp(ep_status_string(EP_OK), "EP_OK") == 0, "EP_OK has its name");
    bool all = true;
    for (int st = EP_ERR_INTERNAL; st <= EP_AGAIN; st++) {
        all = all && strncmp(ep_status_string((ep_status)st), "EP_", 3) == 0;
    }
    ok(all, "every status has a name");
    ok(ep_status_string((ep_status)99) != NULL, "a number that is no status has a text");
    epi_clear_error();
    ok(ep_last_error()[0] == '\0', "no error, no text");
    ok(epi_fail(EP_ERR_ARG, "hidden is %d", 7) == EP_ERR_ARG, "epi_fail returns the status");
    ok(strcmp(ep_last_error(), "hidden is 7") == 0, "the text is formatted");
    epi_fail(EP_ERR_ARG, "outer: %s", epi_error_text());
    ok(strcmp(ep_last_error(), "outer: hidden is 7") == 0, "a text can wrap itself");
    char big[2000];
    memset(big, 'x', sizeof(big) - 1);
    big[sizeof(big) - 1] = '\0';
    epi_fail(EP_ERR_ARG, "%s", big);
    size_t len = strlen(ep_last_error());
    ok(len == EPI_ERROR_TEXT_BYTES - 1 && strcmp(ep_last_error() + len - 3, "...") == 0,
       "a long text is cut, and says so");
}

static void *other_thread(void *arg) {
    epi_fail(EP_ERR_PEER, "mine");
    sigset_t set;
    pthread_sigmask(SIG_BLOCK, NULL, &set);
    int *out = arg;
    out[0] =
        sigismember(&set, SIGINT) && sigismember(&set, SIGUSR1) && sigismember(&set, SIGCHLD);
    out[1] = !sigismember(&set, SIGSEGV) && !sigismember(&set, SIGPROF);
    return NULL;
}

static void test_thread(void) {
    pthread_t thread;
    int result[2] = {0, 0};
    epi_fail(EP_ERR_ARG, "theirs");
    int err = epi_thread_start(&thread, other_thread, result, "a-name-longer-than-fifteen");
    if (!ok(err == 0, "a thread starts")) {
        return;
    }
    pthread_join(thread, NULL);
    ok(strcmp(ep_last_error(), "theirs") == 0, "error text belongs to its thread");
    ok(result[0], "our threads take no asynchronous signals");
    ok(result[1], "our threads take their own faults");
    sigset_t set;
    pthread_sigmask(SIG_BLOCK, NULL, &set);
    ok(!sigismember(&set, SIGINT), "the caller's mask is as it was");
}

static void test_knobs(void) {
    char log[4096];
    unsetenv("EP_TIMEOUT_MS");
    ok(epi_opt_int(EPI_OPT_TIMEOUT_MS) == 100000, "an unset knob has its default");
    setenv("EP_TIMEOUT_MS", "250", 1);
    ok(epi_opt_int(EPI_OPT_TIMEOUT_MS) == 250, "a knob is read anew on each call");
    setenv("EP_TIMEOUT_MS", "", 1);
    ok(epi_opt_int(EPI_OPT_TIMEOUT_MS) == 100000, "an empty value counts as unset");
    ok(!epi_opt_str(EPI_OPT_JOB), "a string without default is NULL");
    setenv("EP_JOB", "blue", 1);
    ok(strcmp(epi_opt_str(EPI_OPT_JOB), "blue") == 0, "a string is handed through");
    unsetenv("EP_JOB");
    static const char *const bad[] = {"99",  "86400001", "12x", "x",
                                      "1e3", " ",        "-5",  "99999999999999999999"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        setenv("EP_TIMEOUT_MS", bad[i], 1);
        capture_begin();
        int64_t value = epi_opt_int(EPI_OPT_TIMEOUT_MS);
        value += epi_opt_int(EPI_OPT_TIMEOUT_MS);
        capture_end(log, sizeof(log));
        ok(value == 200000, "EP_TIMEOUT_MS=\"%s\": the default is used", bad[i]);
        ok(count(log, "\n") == 1 && strstr(log, "EP_TIMEOUT_MS") && strstr(log, bad[i]) &&
               strstr(log, "100..86400000") != NULL,
           "one warning names variable, value and rule");
    }
    unsetenv("EP_TIMEOUT_MS");
}

static void test_knob_table(void) {
    bool good = epi_opt_count() >= 6;
    setenv("EP_PORT", "700000", 1);
    for (size_t i = 0; i < epi_opt_count(); i++) {
        const struct epi_opt_info *info = epi_opt_info(i);
        good = good && info && strncmp(info->name, "EP_", 3) == 0 && info->doc[0] != 0 &&
               info->rule[0] != 0;
        if (good && strcmp(info->name, "EP_PORT") == 0) {
            ok(info->set && !info->valid && strcmp(info->value, "0") == 0,
               "the table shows a malformed value for what it is");
        }
    }
    unsetenv("EP_PORT");
    ok(good, "every knob has a name, a rule and a line of text");
    ok(!epi_opt_info(epi_opt_count()), "the table ends");
    setenv("WORLD_SIZE", "4", 1);
    ok(strcmp(epi_env("WORLD_SIZE"), "4") == 0, "launcher variables are readable");
    const struct epi_opt_info *info;
    bool shown = false;
    good = true;
    for (size_t i = 0; (info = epi_foreign_info(i)) != NULL; i++) {
        good = good && info->doc[0] != 0 && info->set == (epi_env(info->name) != NULL);
        shown =
            shown || (strcmp(info->name, "WORLD_SIZE") == 0 && strcmp(info->value, "4") == 0);
    }
    ok(good && shown, "and are shown, with what each is for");
    unsetenv("WORLD_SIZE");
    char log[512];
    capture_begin();
    ok(!epi_env("PATH"), "other variables are not");
    capture_end(log, sizeof(log));
    ok(strstr(log, "PATH") != NULL, "and asking for one is noticed");
}

static void test_log(void) {
    char log[4096];
    setenv("EP_LOG", "info", 1);
    epi_log_reload();
    epi_log_set_rank(3);
    capture_begin();
    errno = EBUSY;
    epi_log(EPI_LOG_INFO, "two\nlines %d", 1);
    bool errno_kept = errno == EBUSY;
    epi_log(EPI_LOG_DEBUG, "not shown");
    capture_end(log, sizeof(log));
    ok(strcmp(log, "libep: info: [rank 3] two?lines 1\n") == 0, "a line looks as it should");
    ok(errno_kept, "logging keeps errno");
    epi_log_set_rank(-1);
    setenv("EP_LOG", "loud", 1);
    capture_begin();
    epi_log_reload();
    capture_end(log, sizeof(log));
    ok(strstr(log, "EP_LOG=\"loud\"") && strstr(log, "error|warn|info|debug") != NULL,
       "a malformed EP_LOG is reported");
    ok(epi_log_enabled(EPI_LOG_WARN) && !epi_log_enabled(EPI_LOG_INFO), "and warn is in force");
    unsetenv("EP_LOG");
    epi_log_reload();
    char big[3000];
    memset(big, 'y', sizeof(big) - 1);
    big[sizeof(big) - 1] = '\0';
    capture_begin();
    epi_log(EPI_LOG_WARN, "%s", big);
    capture_end(log, sizeof(log));
    ok(strlen(log) <= 1024 && count(log, "\n") == 1, "a long line is cut, and stays one line");
}

static void test_time(void) {
    int64_t start_ns = epi_now_ns();
    epi_sleep_ns(20 * EPI_NS_PER_MS);
    ok(epi_now_ns() - start_ns >= 20 * EPI_NS_PER_MS, "sleeping takes its time");
    struct epi_deadline soon = epi_deadline_after(5 * EPI_NS_PER_S);
    int64_t left_ns = epi_deadline_left_ns(soon);
    int left_ms = epi_deadline_left_ms(soon);
    ok(left_ns > EPI_NS_PER_S && left_ns <= 5 * EPI_NS_PER_S, "time is left");
    ok(left_ms > 0 && left_ms <= 1000, "who waits looks at the clock again soon");
    ok(!epi_deadline_expired(soon), "a deadline ahead has not passed");
    struct epi_deadline past = epi_deadline_after(-1);
    ok(epi_deadline_expired(past) && epi_deadline_left_ms(past) == 0, "one behind has");
    ok(epi_deadline_left_ms(epi_deadline_after(INT64_MAX)) == INT_MAX, "a far one saturates");
    ok(!epi_deadline_expired(epi_deadline_never()), "never does not come");
    struct epi_deadline one = {.at_ns = epi_now_ns() + EPI_NS_PER_S};
    ok(epi_deadline_left_ms(one) >= 1, "milliseconds are rounded up");
    ok(epi_deadline_min(soon, past).at_ns == past.at_ns, "the earlier of two");
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t cond;
    ok(epi_cond_init(&cond) == 0, "a condition is made");
    pthread_mutex_lock(&lock);
    start_ns = epi_now_ns();
    while (epi_cond_wait(&cond, &lock, epi_deadline_min(soon, epi_deadline_after(0)))) {
    }
    bool timely = epi_now_ns() - start_ns < EPI_NS_PER_S;
    pthread_mutex_unlock(&lock);
    pthread_cond_destroy(&cond);
    ok(timely, "a wait ends at its deadline");
}

static void test_alloc(void) {
    int64_t live = epi_alloc_live();
    unsigned char *p = epi_alloc(100);
    void *empty = epi_alloc(0);
    bool zero = p != NULL;
    for (int i = 0; zero && i < 100; i++) {
        zero = p[i] == 0;
    }
    ok(zero && (uintptr_t)p % 64 == 0, "memory is zeroed and aligned");
    ok(empty != NULL, "nothing is something");
    ok(epi_alloc_live() == live + 2, "what is out is counted");
    epi_free(p);
    epi_free(empty);
    epi_free(NULL);
    ok(epi_alloc_live() == live, "and what came back");
    ok(!epi_alloc(SIZE_MAX) && !epi_alloc_array(SIZE_MAX / 2, 3), "sizes that overflow fail");
    epi_alloc_fail_at(epi_alloc_count() + 2);
    void *first = epi_alloc(1);
    void *second = epi_alloc(1);
    void *third = epi_alloc(1);
    epi_alloc_fail_at(0);
    ok(first && !second && third != NULL, "exactly the n-th allocation fails");
    epi_free(first);
    epi_free(third);
    epi_alloc_fail_at(epi_alloc_count() + 1);
    pthread_t thread;
    ok(epi_thread_start(&thread, other_thread, NULL, "never") == EAGAIN, "threads too");
    epi_alloc_fail_at(0);
    ok(epi_alloc_live() == live, "a failed one is not out");
}

static void test_hash(void) {
    const uint64_t whole = epi_hash(EPI_HASH_BEGIN, "foobar", 6);
    ok(epi_hash(EPI_HASH_BEGIN, "a", 1) == UINT64_C(0xaf63dc4c8601ec8c) &&
           whole == UINT64_C(0x85944171f73967e8),
       "the hash is FNV-1a of 64 bits");
    ok(epi_hash(epi_hash(EPI_HASH_BEGIN, "foo", 3), "bar", 3) == whole &&
           epi_hash(whole, NULL, 0) == whole,
       "and can be taken in pieces");
}

/* What two ranks say of a step, as rank 1 hears it; or that they could not be gathered. */
struct hearing {
    ep_status status[2];
    bool fails;
};

static ep_status hear(void *ctx, const void *in, size_t bytes, void *out) {
    const struct hearing *h = ctx;
    memcpy((char *)out + bytes, in, bytes);
    memset(out, 0, bytes);
    if (bytes == sizeof(int32_t)) {
        memcpy(out, &h->status[0], bytes);
    } else {
        snprintf(out, bytes, "too many open files");
    }
    return h->fails ? epi_fail(EP_ERR_PEER, "rank 0 has left") : EP_OK;
}

static ep_status agree_on(ep_status peer, ep_status mine, bool fails) {
    struct hearing h = {{peer, mine}, fails};
    const struct epi_exchange x = {hear, &h, 1, 2};
    if (mine != EP_OK) {
        epi_fail(mine, "rank 0 did not pass its memory");
    }
    epi_alloc_fail_at(epi_alloc_count() + 1); /* nobody needs memory to say that he has none */
    const ep_status st = epi_agree(&x, mine, "the step");
    epi_alloc_fail_at(0);
    return st;
}

static bool told(const char *what) {
    return strstr(ep_last_error(), what) != NULL;
}

static void test_agreement(void) {
    ok(agree_on(EP_OK, EP_OK, false) == EP_OK, "all went well");
    ok(agree_on(EP_ERR_SYSTEM, EP_OK, false) == EP_ERR_PEER && told("rank 0") &&
           told("too many open files"),
       "a peer's failure is told with its reason");
    ok(agree_on(EP_ERR_SYSTEM, EP_ERR_PEER, false) == EP_ERR_PEER &&
           told("too many open files") && !told("did not pass"),
       "what was missed of a peer is told by the peer, who knows why");
    ok(agree_on(EP_OK, EP_ERR_PEER, false) == EP_ERR_PEER && told("did not pass"),
       "unless it knows of nothing");
    ok(agree_on(EP_ERR_SYSTEM, EP_ERR_NOMEM, false) == EP_ERR_NOMEM && told("did not pass"),
       "a failure of the own rank is its own");
    ok(agree_on(EP_OK, EP_ERR_PEER, true) == EP_ERR_PEER && told("has left") &&
           told("did not pass"),
       "when the ranks cannot be asked, both are told");
}

int main(void) {
    gpu_never("status, log, knobs");
    tap_deadline(60);
    unsetenv("EP_LOG");
    test_status();
    test_thread();
    test_knobs();
    test_knob_table();
    test_log();
    test_time();
    test_alloc();
    test_hash();
    test_agreement();
    return done_testing();
}
