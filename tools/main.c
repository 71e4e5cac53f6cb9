/* SPDX-License-Identifier: MIT */
/*
 * The program `ep`: finds the subcommand, hands over, and sees that what it said has arrived.
 *
 * Owns the list of subcommands. Must not know what they do beyond one line each, nor call a
 * command good whose output was lost.
 */
#include "tools/tool.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

static const struct {
    const char *name;
    int (*fn)(int argc, char **argv);
    const char *help;
} commands[] = {
    {"demo", cmd_demo,
     "a Mixture-of-Experts layer over real text, across 4 processes, checked"},
    {"bench", cmd_bench,
     "how long dispatch and combine take, and how close that is to the limit"},
    {"predict", cmd_predict, "the same on machines that are not here, by their links"},
    {"run", cmd_run, "start a program as the ranks of one job, here or on several hosts"},
    {"doctor", cmd_doctor, "what works on this machine, what is missing and how to get it"},
    {"env", cmd_env, "the environment variables libep reads"},
};

const char *tool_program = "ep";
int tool_output_error;

static void print_help(void) {
    printf("ep - libep %s, expert-parallel communication\n\n", text_version().s);
    printf("usage: ep COMMAND [options]\n\n");
    for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
        printf("  %-8s %s\n", commands[i].name, commands[i].help);
    }
    printf("\n`ep COMMAND --help` lists the options of a command. New here? Try `ep demo`.\n");
}

/* Who starts us without a standard stream would have the next file or socket take its number. In
 * its place comes one on which writing to stdout fails, as it would have. */
static void fill_streams(void) {
    static const int flags[] = {O_RDONLY, O_RDONLY, O_WRONLY};
    for (int fd = 0; fd <= 2; fd++) {
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", flags[fd]) < 0) {
            _exit(1); /* there is nowhere to say so */
        }
    }
}

/* The status of a command, unless what it printed did not get out. */
static int after_output(int status) {
    const bool good = tool_flush() && ferror(stdout) == 0;
    if (fclose(stdout) == 0 && good) {
        return status;
    }
    const int error = tool_output_error != 0 ? tool_output_error : errno;
    fprintf(stderr, "ep: cannot write to standard output: %s\n",
            error == EBADF ? "it is closed" : strerror(error));
    return status != 0 ? status : 1;
}

static int run_command(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "--help";
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0) {
        print_help();
        return 0;
    }
    if (strcmp(name, "--version") == 0) {
        printf("ep %s\n", text_version().s);
        return 0;
    }
    for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
        if (strcmp(name, commands[i].name) == 0) {
            return commands[i].fn(argc - 1, argv + 1);
        }
    }
    return args_refuse("ep", "unknown command %s", name);
}

int main(int argc, char **argv) {
    tool_program = argc > 0 ? argv[0] : "ep";
    fill_streams();
    return after_output(run_command(argc, argv));
}
