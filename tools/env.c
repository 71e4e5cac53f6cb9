/* SPDX-License-Identifier: MIT */
/*
 * `ep env`: the one table of environment knobs, as the library reads it, and what it reads of
 * others.
 *
 * Owns nothing. Must not know any knob by name: what it prints is what src/base/opt.c has.
 */
#include "tools/tool.h"

static void print_json(void) {
    const struct epi_opt_info *info;
    printf("[");
    for (size_t i = 0; (info = epi_opt_info(i)) != NULL; i++) {
        const char *const fields[][2] = {{"name", info->name},
                                         {"value", info->value},
                                         {"default", info->default_text},
                                         {"rule", info->rule},
                                         {"meaning", info->doc}};
        printf("%s\n  {", i > 0 ? "," : "");
        for (size_t f = 0; f < sizeof(fields) / sizeof(fields[0]); f++) {
            printf("\"%s\": ", fields[f][0]);
            text_json(stdout, fields[f][1]);
            printf(", ");
        }
        printf("\"set\": %s, \"valid\": %s}", info->set ? "true" : "false",
               info->valid ? "true" : "false");
    }
    for (size_t i = 0; (info = epi_foreign_info(i)) != NULL; i++) {
        printf(",\n  {\"name\": \"%s\", \"value\": ", info->name);
        text_json(stdout, info->value);
        printf(", \"meaning\": ");
        text_json(stdout, info->doc);
        printf(", \"set\": %s, \"foreign\": true}", info->set ? "true" : "false");
    }
    printf("\n]\n");
}

int cmd_env(int argc, char **argv) {
    bool json = false;
    const struct opt opts[] = {{"json", 0, OPT_FLAG, &json, 0, 0, NULL, "as JSON"}};
    const struct command command = {
        .name = "ep env",
        .usage = "[--json]",
        .about = "Every environment variable that libep reads, with the value in force here.",
        .opts = opts,
        .num_opts = 1,
    };
    int status = args_parse(&command, argc, argv, NULL);
    if (status >= 0) {
        return status;
    }
    if (json) {
        print_json();
        return 0;
    }
    const struct epi_opt_info *info;
    printf("%-20s %-14s %-10s %s\n", "name", "value", "default", "meaning");
    for (size_t i = 0; (info = epi_opt_info(i)) != NULL; i++) {
        char value[264];
        snprintf(value, sizeof(value), "%s%s", info->value[0] != '\0' ? info->value : "-",
                 info->set ? info->valid ? " *" : " !" : "");
        printf("%-20s %-14s %-10s %s\n", info->name, value,
               info->default_text[0] != '\0' ? info->default_text : "-", info->doc);
        printf("%47s%s\n", "", info->rule);
    }
    printf(
        "\n* set in the environment   ! set to what it must not be, so the default is used\n");
    printf("\n%-27s %-18s %s\n", "name that is not libep's", "value", "used for");
    for (size_t i = 0; (info = epi_foreign_info(i)) != NULL; i++) {
        printf("%-27s %-18s %s\n", info->name, info->set ? info->value : "-", info->doc);
    }
    return 0;
}
