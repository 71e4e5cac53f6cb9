/* SPDX-License-Identifier: MIT */
/*
 * `ep run --hosts`: what is started on each host, by ssh or what is like it. The command goes through a
 * shell there, so its words are quoted; the job's key does not go with it, as others could see it.
 */
#include "tools/tool.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#define COMMAND_BYTES (1 << 17) /* as much as one word of a command may have */

extern char **environ;

bool hosts_read(struct hosts *h, char *list) {
    for (char *name = strtok(list, ","); name; name = strtok(NULL, ",")) {
        if (h->num == EP_MAX_RANKS || name[0] == '-') {
            return false;
        }
        h->name[h->num++] = name;
    }
    return h->num > 0;
}

const char *hosts_address(const struct hosts *h) {
    const char *at = strrchr(h->name[0], '@');
    return at ? at + 1 : h->name[0];
}

int hosts_first(const struct hosts *h, int num_ranks, int i) {
    const int each = num_ranks / h->num, more = num_ranks % h->num;
    return i * each + (i < more ? i : more);
}

/* False, for good: it does not fit. */
static bool add(char *out, const char *text) {
    const size_t used = strlen(out);
    const bool fits = used + strlen(text) < COMMAND_BYTES;
    if (fits) {
        memcpy(out + used, text, strlen(text) + 1);
    }
    return fits;
}

/* " 'text'", for a shell. */
static bool add_word(char *out, const char *text) {
    bool fits = add(out, " '");
    for (; fits && *text != '\0'; text++) {
        const char one[2] = {*text, '\0'};
        fits = add(out, *text == '\'' ? "'\\''" : one);
    }
    return fits && add(out, "'");
}

/* What the library is told by the environment is told there, too. */
static bool add_environment(char *out) {
    bool fits = add(out, " && exec env");
    for (char **e = environ; fits && *e; e++) {
        const bool ours =
            strncmp(*e, "EP_", 3) == 0 || strncmp(*e, "LD_LIBRARY_PATH=", 16) == 0;
        if (ours && strncmp(*e, "EP_JOB_KEY=", 11) != 0) {
            fits = add_word(out, *e);
        }
    }
    return fits;
}

static bool make_command(const struct hosts *h, int i, int num_ranks, int port, char **program,
                         char *out) {
    char self[1024], folder[1024], part[300], number[2][24];
    const ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
    if (n <= 0 || !getcwd(folder, sizeof(folder))) {
        return false;
    }
    self[n] = '\0';
    snprintf(part, sizeof(part), "%d/%d/%s", hosts_first(h, num_ranks, i), num_ranks,
             hosts_address(h));
    snprintf(number[0], sizeof(number[0]), "%d",
             hosts_first(h, num_ranks, i + 1) - hosts_first(h, num_ranks, i));
    snprintf(number[1], sizeof(number[1]), "%d", port);
    const char *const words[] = {self,      "run", "--part",  part, "-n",
                                 number[0], "-p",  number[1], "--"};
    bool fits = add(out, "cd") && add_word(out, folder) && add_environment(out);
    for (size_t w = 0; fits && w < sizeof(words) / sizeof(words[0]); w++) {
        fits = add_word(out, words[w]);
    }
    for (; fits && *program; program++) {
        fits = add_word(out, *program);
    }
    return fits;
}

void hosts_exec(const struct hosts *h, int i, int num_ranks, int port, char **program) {
    char *words[64], ssh[1024];
    char *command = calloc(1, COMMAND_BYTES);
    int num = 0;
    snprintf(ssh, sizeof(ssh), "%s", h->ssh);
    for (char *w = strtok(ssh, " "); w && num < 61; w = strtok(NULL, " ")) {
        words[num++] = w;
    }
    if (!command || num == 0 || !make_command(h, i, num_ranks, port, program, command)) {
        dprintf(2, "ep run: the command for host %s cannot be made\n", h->name[i]);
        _exit(126);
    }
    words[num++] = (char *)h->name[i];
    words[num++] = command;
    words[num] = NULL;
    execvp(words[0], words);
    dprintf(2, "ep run: cannot run %s: %s\n", words[0], strerror(errno));
    _exit(errno == ENOENT ? 127 : 126);
}
