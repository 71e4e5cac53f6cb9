/* SPDX-License-Identifier: MIT */
/*
 * The program `ep`: finds the subcommand and hands over.
 *
 * Owns the list of subcommands. Must not know what they do beyond one line each.
 */
#include "tools/tool.h"

static const struct {
    const char *name;
    int (*fn)(int argc, char **argv);
    const char *help;
} commands[] = {
    {"demo", cmd_demo,
     "a Mixture-of-Experts layer over real text, across 4 processes, checked"},
    {"bench", cmd_bench,
     "how long dispatch and combine take, and how close that is to the limit"},
    {"run", cmd_run, "start a program as the ranks of one job on this machine"},
    {"doctor", cmd_doctor, "what works on this machine, what is missing and how to get it"},
    {"env", cmd_env, "the environment variables libep reads"},
};

const char *tool_program = "ep";

static void print_help(void) {
    printf("ep - libep %s, expert-parallel communication\n\n", text_version().s);
    printf("usage: ep COMMAND [options]\n\n");
    for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
        printf("  %-8s %s\n", commands[i].name, commands[i].help);
    }
    printf("\n`ep COMMAND --help` lists the options of a command. New here? Try `ep demo`.\n");
}

int main(int argc, char **argv) {
    tool_program = argc > 0 ? argv[0] : "ep";
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
