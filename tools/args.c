/* SPDX-License-Identifier: MIT */
/*
 * Options of the subcommands, read from a table; the same table prints --help.
 *
 * Owns nothing. Must not accept what it does not understand: an unknown option, a number out of
 * its range and a leftover argument are named, and the exit status is 2.
 */
#include "tools/tool.h"

int args_refuse(const char *name, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    fprintf(stderr, "%s: ", name);
    vfprintf(stderr, fmt, args);
    fprintf(stderr, "; see `%s --help`\n", name);
    va_end(args);
    return 2;
}

/* A number or a choice that is not set yet has no default here: its help says what is meant. */
static void print_default(const struct opt *opt) {
    if (opt->kind == OPT_INT && *(int64_t *)opt->value >= opt->min) {
        printf(" (%lld)", (long long)*(int64_t *)opt->value);
    } else if (opt->kind == OPT_TEXT && *(const char **)opt->value) {
        printf(" (%s)", *(const char **)opt->value);
    } else if (opt->kind == OPT_CHOICE && *(int *)opt->value >= 0) {
        const char *p = opt->meta;
        for (int i = *(int *)opt->value; i > 0; i--) {
            p += strcspn(p, "|") + 1;
        }
        printf(" (%.*s)", (int)strcspn(p, "|"), p);
    }
}

static void print_help(const struct command *command) {
    printf("usage: %s %s\n\n", command->name, command->usage);
    text_wrap(command->about, 0);
    printf("\noptions:\n");
    for (int i = 0; i < command->num_opts; i++) {
        const struct opt *opt = &command->opts[i];
        char left[80];
        char letter[8] = "    ";
        if (opt->letter != 0) {
            snprintf(letter, sizeof(letter), "-%c, ", opt->letter);
        }
        snprintf(left, sizeof(left), "  %s--%s %s", letter, opt->name,
                 opt->meta ? opt->meta : "");
        printf("%-30s%s", left, strlen(left) > 29 ? "\n                              " : "");
        printf("%s", opt->help);
        print_default(opt);
        putchar('\n');
    }
    printf("      --help                  this text\n");
}

static bool parse_choice(const char *text, const struct opt *opt) {
    size_t len = strlen(text);
    int index = 0;
    for (const char *p = opt->meta; p; index++) {
        if (strcspn(p, "|") == len && strncmp(p, text, len) == 0) {
            *(int *)opt->value = index;
            return true;
        }
        p = strchr(p, '|');
        p = p ? p + 1 : NULL;
    }
    return false;
}

static int set_value(const struct command *command, const struct opt *opt, const char *text) {
    if (opt->kind == OPT_INT && !epi_parse_int(text, 10, opt->min, opt->max, opt->value)) {
        return args_refuse(command->name, "--%s must be a number in %lld..%lld, not \"%s\"",
                           opt->name, (long long)opt->min, (long long)opt->max, text);
    }
    if (opt->kind == OPT_CHOICE && !parse_choice(text, opt)) {
        return args_refuse(command->name, "--%s must be one of %s, not \"%s\"", opt->name,
                           opt->meta, text);
    }
    if (opt->kind == OPT_TEXT) {
        *(const char **)opt->value = text;
    }
    return -1;
}

/* The option an argument names, and what follows its '=' or its letter, if anything. */
static const struct opt *find(const struct command *command, const char *arg,
                              const char **value) {
    for (int i = 0; i < command->num_opts; i++) {
        const struct opt *opt = &command->opts[i];
        size_t len = strlen(opt->name);
        if (strncmp(arg, "--", 2) == 0 && strncmp(arg + 2, opt->name, len) == 0 &&
            (arg[2 + len] == '\0' || arg[2 + len] == '=')) {
            *value = arg[2 + len] == '=' ? arg + 3 + len : NULL;
            return opt;
        }
        if (arg[1] != '-' && arg[1] == opt->letter) {
            *value = arg[2] != '\0' ? arg + 2 : NULL;
            return opt;
        }
    }
    return NULL;
}

int args_parse(const struct command *command, int argc, char **argv, int *rest) {
    int i = 1;
    for (; i < argc && argv[i][0] == '-' && argv[i][1] != '\0'; i++) {
        const char *arg = argv[i];
        if (strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0) {
            print_help(command);
            return 0;
        }
        if (strcmp(arg, "--") == 0) {
            i++;
            break;
        }
        const char *value = NULL;
        const struct opt *opt = find(command, arg, &value);
        if (!opt) {
            return args_refuse(command->name, "unknown option %s", arg);
        }
        if (opt->kind == OPT_FLAG) {
            if (value) {
                return args_refuse(command->name, "--%s takes no value", opt->name);
            }
            *(bool *)opt->value = true;
            continue;
        }
        if (!value && ++i >= argc) {
            return args_refuse(command->name, "%s needs a value, %s", arg, opt->meta);
        }
        int status = set_value(command, opt, value ? value : argv[i]);
        if (status >= 0) {
            return status;
        }
    }
    if (rest) {
        *rest = i;
    } else if (i < argc) {
        return args_refuse(command->name, "unexpected argument \"%s\"", argv[i]);
    }
    return -1;
}
