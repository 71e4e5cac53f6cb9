/* SPDX-License-Identifier: MIT */
/*
 * A folder that a test may fill, and the few things tests do with files in it.
 */
#ifndef TESTS_SCRATCH_H
#define TESTS_SCRATCH_H

#include <stdbool.h>
#include <stddef.h>

#define SCRATCH_PATH_BYTES 512

/* An empty folder, removed with all it holds when the program ends. */
const char *scratch_folder(void);
/* FOLDER/NAME, for as long as the program runs. */
const char *scratch_path(const char *folder, const char *name);
/* Makes the folder and what is missing above it; returns `path`. */
const char *scratch_make(const char *path);
void scratch_remove(const char *path); /* a file or a folder with all it holds */

/* How many files of the folder have a name that ends with `tail`. */
int scratch_count(const char *folder, const char *tail);
/* One of them; "" when there is none. */
const char *scratch_find(const char *folder, const char *tail);

bool scratch_write(const char *path, const void *data, size_t bytes);
/* To be freed; ended by a 0. NULL: there is no such file. */
char *scratch_read(const char *path, size_t *bytes);

/* Lets go of root's right to pass over permissions, for this process. */
bool scratch_obey_permissions(void);

/* How often what this rank of tap_spawn_ranks has printed or logged so far holds `text`. */
int scratch_logged(const char *text);

#endif
