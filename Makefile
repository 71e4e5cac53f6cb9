# SPDX-License-Identifier: MIT
# libep: plain GNU make, no configure step. `make help` lists the targets.
#
# One variable picks what is built: VARIANT= (build/), clang, asan, ubsan, san (both), tsan,
# cov, fuzz, aarch64 (build/NAME/). Sources are found by their place in the tree.

VERSION := 0.1.0
SOVERSION := 0

PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include

ifeq ($(origin CC),default)
CC := $(if $(shell command -v cc 2>/dev/null),cc,gcc)
endif
AR ?= ar
OPT ?= -O2
KERNEL_OPT ?= -O3

VARIANT ?=
BUILD ?= build$(if $(VARIANT),/$(VARIANT))
B := $(BUILD)
# What names functions and lines in a report is enough of a variant, and a quarter sooner compiled.
DEBUG := $(if $(VARIANT),-g1,-g)

ifeq ($(VARIANT),clang)
override CC := clang
endif
ifeq ($(VARIANT),asan)
VARIANT_FLAGS := -fsanitize=address -fno-omit-frame-pointer
endif
ifeq ($(VARIANT),ubsan)
VARIANT_FLAGS := -fsanitize=undefined -fno-sanitize-recover=all
endif
ifeq ($(VARIANT),san)
VARIANT_FLAGS := -fsanitize=address,undefined -fno-sanitize-recover=all \
    -fno-omit-frame-pointer
COVERAGE := 1
OPT := -O1
KERNEL_OPT := -O1
endif
ifeq ($(VARIANT),tsan)
# Late movers: copies happen late, as on another thread, so that a missing wait is a race.
VARIANT_FLAGS := -fsanitize=thread -fno-omit-frame-pointer -DK_LATE_MOVERS=tests/late/mover.h
LATE_SRC := tests/late/late.c
OPT := -O1
KERNEL_OPT := -O1
endif
ifeq ($(VARIANT),cov)
COVERAGE := 1
OPT := -O1
KERNEL_OPT := -O1
endif
ifeq ($(VARIANT),fuzz)
override CC := clang
VARIANT_FLAGS := -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all
endif
ifeq ($(VARIANT),aarch64)
override CC := aarch64-linux-gnu-gcc
AR := aarch64-linux-gnu-ar
endif

# EXTRA_CFLAGS is the user's; the flags before it are what the sources rely on.
WARN := -Wall -Wextra -Werror -Wvla -Wmissing-prototypes -Wstrict-prototypes
# A write beyond an array ends the program instead of being obeyed. Sanitizers do that themselves;
# _FORTIFY_SOURCE needs optimization, and not every compiler has every flag for every CPU.
ifeq ($(filter asan ubsan san tsan fuzz,$(VARIANT)),)
HARDEN := -fstack-protector-strong \
    $(shell $(CC) -Werror -fstack-clash-protection -x c -c /dev/null -o /dev/null 2>/dev/null && \
    echo -fstack-clash-protection) \
    $(if $(filter -O0,$(OPT) $(KERNEL_OPT)),,-U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2)
endif
# Nor can a table of addresses, the stack or the place of the program be made use of.
HARDEN_LINK := -Wl,-z,relro,-z,now,-z,noexecstack
BASE_FLAGS := -std=c11 -D_GNU_SOURCE $(DEBUG) -fPIC -fvisibility=hidden -ffp-contract=off -pthread \
    $(HARDEN) $(WARN) $(VARIANT_FLAGS)
INCLUDES := -Iinclude -I.
LIBS := -pthread -ldl -lm
# Of the library and the kernels alone: what checks their results is slow enough.
LIB_FLAGS := $(if $(COVERAGE),--coverage -fprofile-update=single)
LIBS += $(if $(COVERAGE),--coverage)

LIB_SRC := $(sort $(wildcard src/*/*.c))
KERNEL_SRC := $(sort $(wildcard kernel/*.k.c))
KERNEL_TEXT := $(sort $(wildcard kernel/*.h)) $(KERNEL_SRC)
# `ep demo` is an example that is built into the program.
DEMO_SRC := $(sort $(wildcard examples/demo/*.c))
TOOL_SRC := $(sort $(wildcard tools/*.c)) $(DEMO_SRC)
TEST_SRC := $(sort $(wildcard tests/t_*.c))
FUZZ_SRC := $(sort $(wildcard tests/fuzz_*.c))
# Every other file of tests/ supports the tests: tap.c, the reference, ...
SUPPORT_SRC := $(filter-out $(TEST_SRC) $(FUZZ_SRC) tests/replay.c,$(sort $(wildcard tests/*.c)))
EXAMPLE_SRC := $(sort $(wildcard examples/*.c))
FMT_SRC = $(sort $(wildcard $(foreach d,include src src/* kernel tools tests tests/* examples \
    examples/* python/ep/src, $(d)/*.c $(d)/*.h)))

# The host bodies of kernels, which call nothing above them.
KERNEL_OBJ := $(KERNEL_SRC:%.c=$(B)/obj/%.o) $(LATE_SRC:%.c=$(B)/obj/%.o)
LIB_OBJ := $(LIB_SRC:%.c=$(B)/obj/%.o) $(KERNEL_OBJ) \
    $(B)/obj/gen/kernel_text.o
TOOL_OBJ := $(TOOL_SRC:%.c=$(B)/obj/%.o)
SUPPORT_OBJ := $(SUPPORT_SRC:%.c=$(B)/obj/%.o)
TESTS := $(TEST_SRC:tests/%.c=$(B)/tests/%)
FUZZERS := $(FUZZ_SRC:tests/%.c=$(B)/tests/%)
EXAMPLES := $(EXAMPLE_SRC:examples/%.c=$(B)/examples/%)
TOOL := $(if $(TOOL_SRC),$(B)/ep)

ifeq ($(V),1)
Q :=
SAY := @:
else
Q := @
SAY = @printf '%-7s %s\n'
endif
# Everything runs on all cores unless the caller said how many.
JOBS = $(if $(findstring jobserver,$(MAKEFLAGS)),,-j$(shell nproc 2>/dev/null || echo 2))
SUBMAKE = +$(Q)$(MAKE) --no-print-directory $(JOBS)

.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: all demo test check check-gpu soak asan ubsan tsan gate fuzz bench fmt install uninstall \
    clean help cov law model python-test exports headers lib tests build-all FORCE

# ---- what people call -------------------------------------------------------------------

all:
	$(Q)scripts/deps.sh build
	$(SUBMAKE) build-all

help:
	@echo 'make            the library, the program build/ep, examples'
	@echo 'make demo       build, then a Mixture-of-Experts layer over 4 processes'
	@echo 'make test       the inner loop: a minute; T="t_combine t_args" for some of the tests'
	@echo 'make check      everything a change must pass (a quarter of an hour on 2 cores)'
	@echo 'make check-gpu  the tests on the GPUs of this machine, ARGS=--quick for some, GPU_SECONDS=N'
	@echo 'make soak       the tests with many seeds, SOAK_SECONDS=600'
	@echo 'make asan|ubsan|tsan   the tests under one sanitizer'
	@echo 'make gate       kernels for every GPU generation, and aarch64; needs no GPU'
	@echo 'make fuzz       each fuzzer for FUZZ_SECONDS=60'
	@echo 'make bench      build/ep bench'
	@echo 'make cov        line coverage'
	@echo 'make model      the protocol of low-latency mode, every order of events; needs spin'
	@echo 'make python-test   the Python package: its wheel, and tests/python on it'
	@echo 'make fmt law exports headers   format; layer law; exported symbols; ep.h alone'
	@echo 'make install uninstall   honour DESTDIR, PREFIX ($(PREFIX)), LIBDIR, ...'
	@echo 'make clean'
	@echo 'Variables: CC=clang  V=1 full commands  VARIANT=asan|tsan|...  DEPS=0 install nothing'

demo:
	$(Q)scripts/deps.sh build
	$(SUBMAKE) $(B)/ep
	$(Q)$(B)/ep demo $(ARGS)

bench:
	$(Q)scripts/deps.sh build
	$(SUBMAKE) $(B)/ep
	$(Q)$(B)/ep bench $(ARGS)

# T="t_combine t_args": these alone.
test:
	$(Q)scripts/deps.sh build
	$(SUBMAKE) build-all tests
	+$(Q)scripts/test.sh $(T)

check:
	$(Q)scripts/deps.sh check
	+$(Q)scripts/check.sh

check-gpu:
	$(Q)scripts/deps.sh build
	+$(Q)scripts/check_gpu.sh $(ARGS)

soak:
	$(Q)scripts/deps.sh build
	$(SUBMAKE) tests
	$(Q)scripts/soak.sh

asan ubsan tsan:
	$(Q)scripts/deps.sh build
	$(SUBMAKE) VARIANT=$@ tests
	$(Q)scripts/run_tests.sh $@
	$(if $(filter tsan,$@),$(Q)scripts/must_fail.sh)

cov:
	$(Q)scripts/deps.sh build
	$(SUBMAKE) VARIANT=cov tests
	$(Q)find build/cov -name '*.gcda' -delete
	$(Q)scripts/run_tests.sh cov
	$(Q)scripts/cov.sh

gate:
	$(Q)scripts/deps.sh gate
	$(SUBMAKE) build/gate
	+$(Q)scripts/gate.sh

fuzz:
	$(Q)scripts/deps.sh check
	$(SUBMAKE) VARIANT=fuzz fuzzers
	$(Q)scripts/fuzz.sh

fmt:
	$(Q)scripts/fmt.sh fix $(FMT_SRC)

fmt-check:
	$(Q)scripts/fmt.sh check $(FMT_SRC)

law:
	$(Q)scripts/law.sh
	$(Q)scripts/law.sh --self-test

model:
	$(Q)scripts/model.sh

python-test:
	$(Q)scripts/deps.sh check
	+$(Q)scripts/python.sh

exports: $(B)/libep.so
	$(Q)scripts/exports.sh $(B)/libep.so

headers:
	$(Q)scripts/headers.sh

clean:
	$(Q)find build -mindepth 1 -maxdepth 1 ! -name venv -exec rm -rf {} + 2>/dev/null || true
	$(Q)rmdir build 2>/dev/null || true

# ---- what is built ----------------------------------------------------------------------

build-all: lib $(TOOL) $(EXAMPLES)
lib: $(B)/libep.so $(B)/libep.a $(B)/libep.pc
tests: $(TESTS) $(TOOL) $(if $(VARIANT),,lib $(EXAMPLES)) \
    $(B)/driver/libnvrtc.so.13 $(if $(filter-out san tsan,$(VARIANT)),,$(B)/driver/libcuda.so.1)
.PHONY: fuzzers fmt-check
fuzzers: $(FUZZERS)

# Objects are rebuilt when the compiler or the flags change, archives when the list does.
FLAGS_NOW := $(CC) $(BASE_FLAGS) $(LIB_FLAGS) $(OPT) $(KERNEL_OPT) $(EXTRA_CFLAGS)
LIST_NOW := $(LIB_OBJ) $(TOOL_OBJ) $(SUPPORT_OBJ)

$(B)/flags: FORCE
	@mkdir -p $(@D)
	@echo '$(FLAGS_NOW)' | cmp -s - $@ || echo '$(FLAGS_NOW)' > $@

$(B)/list: FORCE
	@mkdir -p $(@D)
	@echo '$(LIST_NOW)' | cmp -s - $@ || echo '$(LIST_NOW)' > $@

COMPILE = $(CC) $(BASE_FLAGS) $(INCLUDES) -MMD -MP

$(B)/obj/src/ep/%.o: src/ep/%.c $(B)/flags
	@mkdir -p $(@D)
	$(SAY) CC $<
	$(Q)$(COMPILE) $(KERNEL_OPT) $(LIB_FLAGS) -include src/export.h $(EXTRA_CFLAGS) -c $< -o $@

$(B)/obj/src/%.o: src/%.c $(B)/flags
	@mkdir -p $(@D)
	$(SAY) CC $<
	$(Q)$(COMPILE) $(OPT) $(LIB_FLAGS) -include src/export.h $(EXTRA_CFLAGS) -c $< -o $@

$(B)/obj/kernel/%.o: kernel/%.c $(B)/flags
	@mkdir -p $(@D)
	$(SAY) KERNEL $<
	$(Q)$(COMPILE) $(KERNEL_OPT) $(LIB_FLAGS) -Wc++-compat $(EXTRA_CFLAGS) -x c -c $< -o $@

# One thread makes cases and references, of memory of its own: nothing for ThreadSanitizer to see.
ifeq ($(VARIANT),tsan)
$(B)/obj/tests/ref.o $(B)/obj/tests/ref_ll.o $(B)/obj/tests/cases.o: OBJ_FLAGS := -fno-sanitize=thread
endif

$(B)/obj/%.o: %.c $(B)/flags
	@mkdir -p $(@D)
	$(SAY) CC $<
	$(Q)$(COMPILE) $(OPT) $(OBJ_FLAGS) $(EXTRA_CFLAGS) -c $< -o $@

$(B)/gen/kernel_text.c: scripts/embed.sh $(KERNEL_TEXT) $(B)/list
	@mkdir -p $(@D)
	$(SAY) EMBED $@
	$(Q)scripts/embed.sh $(KERNEL_TEXT) > $@

$(B)/obj/gen/%.o: $(B)/gen/%.c $(B)/flags
	@mkdir -p $(@D)
	$(SAY) CC $<
	$(Q)$(COMPILE) $(OPT) $(EXTRA_CFLAGS) -c $< -o $@

$(B)/libep.a: $(LIB_OBJ) $(B)/list
	$(SAY) AR $@
	$(Q)rm -f $@
	$(Q)$(AR) rcs $@ $(LIB_OBJ)

$(B)/libep.so.$(VERSION): $(LIB_OBJ) src/libep.map $(B)/list
	$(SAY) LINK $@
	$(Q)$(CC) $(VARIANT_FLAGS) -shared -Wl,-soname,libep.so.$(SOVERSION) \
	    -Wl,--version-script=src/libep.map -Wl,-z,defs -Wl,-z,nodelete $(HARDEN_LINK) \
	    $(LDFLAGS) -o $@ $(LIB_OBJ) $(LIBS)

$(B)/libep.so: $(B)/libep.so.$(VERSION)
	$(Q)ln -sf libep.so.$(VERSION) $(B)/libep.so.$(SOVERSION)
	$(Q)ln -sf libep.so.$(SOVERSION) $@

$(B)/libep.pc: Makefile FORCE
	@mkdir -p $(@D)
	@printf '%s\n' 'prefix=$(PREFIX)' 'libdir=$(LIBDIR)' 'includedir=$(INCLUDEDIR)' '' \
	    'Name: libep' 'Description: expert-parallel communication' 'Version: $(VERSION)' \
	    'Cflags: -I$${includedir}' 'Libs: -L$${libdir} -lep' \
	    'Libs.private: $(LIBS)' > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# The tool and the tests hold the library's objects: build/ep runs anywhere, and tests reach
# internal functions. Examples see what a user sees: ep.h and libep.so.
$(B)/ep: $(TOOL_OBJ) $(B)/libep.a
	$(SAY) LINK $@
	$(Q)$(CC) $(VARIANT_FLAGS) -pie $(HARDEN_LINK) $(LDFLAGS) -o $@ $(TOOL_OBJ) $(B)/libep.a \
	    $(LIBS)

$(B)/libtest.a: $(SUPPORT_OBJ) $(B)/list
	$(SAY) AR $@
	$(Q)rm -f $@
	$(Q)$(AR) rcs $@ $(SUPPORT_OBJ)

DRIVER_OBJ := $(patsubst %,$(B)/obj/tests/driver/%.o,api graph launch memory stream)

# A CUDA driver without a GPU, for tests/t_driver.sh: it has the kernels, and nothing of the library.
# What it keeps for each thread lies in the threads' own blocks: ThreadSanitizer does not see that
# memory which the loader allots later, and frees with the next thread, has one owner at a time.
$(DRIVER_OBJ): OBJ_FLAGS += -ftls-model=initial-exec
$(B)/driver/libcuda.so.1: $(DRIVER_OBJ) $(KERNEL_OBJ)
	@mkdir -p $(@D)
	$(SAY) LINK $@
	$(Q)$(CC) $(VARIANT_FLAGS) $(LDFLAGS) -shared -o $@ $^ $(LIBS)

# A compiler of kernels that compiles nothing: tests of what is around it use it by EP_NVRTC_PATH.
$(B)/driver/libnvrtc.so.13: $(B)/obj/tests/driver/nvrtc.o
	@mkdir -p $(@D)
	$(SAY) LINK $@
	$(Q)$(CC) $(VARIANT_FLAGS) $(LDFLAGS) -shared -Wl,-soname,$(@F) -o $@ $<
	$(Q)ln -sf $(@F) $(@D)/libnvrtc-builtins.so.13.0

$(TESTS): $(B)/tests/%: $(B)/obj/tests/%.o $(B)/libtest.a $(B)/libep.a
	@mkdir -p $(@D)
	$(SAY) LINK $@
	$(Q)$(CC) $(VARIANT_FLAGS) $(LDFLAGS) -o $@ $< $(B)/libtest.a $(B)/libep.a $(LIBS)

# A fuzzer is LLVMFuzzerTestOneInput; without libFuzzer tests/replay.c feeds it files.
ifeq ($(VARIANT),fuzz)
FUZZ_MAIN := -fsanitize=fuzzer
else
FUZZ_MAIN := $(B)/obj/tests/replay.o $(B)/obj/tests/tap.o
endif
$(FUZZERS): $(B)/tests/%: $(B)/obj/tests/%.o $(B)/libep.a $(filter %.o,$(FUZZ_MAIN))
	@mkdir -p $(@D)
	$(SAY) LINK $@
	$(Q)$(CC) $(VARIANT_FLAGS) $(LDFLAGS) -o $@ $(filter %.o,$^) \
	    $(filter-out %.o,$(FUZZ_MAIN)) $(B)/libep.a $(LIBS)
$(B)/tests/fuzz_text: $(B)/obj/tools/routing_file.o

$(EXAMPLES): $(B)/examples/%: examples/%.c include/ep.h $(B)/libep.so
	@mkdir -p $(@D)
	$(SAY) EXAMPLE $@
	$(Q)$(CC) -std=c11 $(OPT) -g $(WARN) -Iinclude $(VARIANT_FLAGS) $(EXTRA_CFLAGS) $< -o $@ \
	    -L$(B) -lep -lm -Wl,-rpath,'$$ORIGIN/..'

build/gate: tests/gate/gate.c src/cu/nvrtc.h
	@mkdir -p $(@D)
	$(SAY) CC $<
	$(Q)$(CC) -std=c11 -D_GNU_SOURCE -O1 -g $(WARN) -I. $< -o $@ -ldl

-include $(LIB_OBJ:.o=.d) $(TOOL_OBJ:.o=.d) $(SUPPORT_OBJ:.o=.d) \
    $(TEST_SRC:%.c=$(B)/obj/%.d) $(FUZZ_SRC:%.c=$(B)/obj/%.d) \
    $(DRIVER_OBJ:.o=.d) $(B)/obj/tests/driver/nvrtc.d

# ---- installation -----------------------------------------------------------------------

D := $(DESTDIR)
INSTALLED = $(D)$(BINDIR)/ep $(D)$(INCLUDEDIR)/ep.h $(D)$(LIBDIR)/libep.a \
    $(D)$(LIBDIR)/libep.so $(D)$(LIBDIR)/libep.so.$(SOVERSION) \
    $(D)$(LIBDIR)/libep.so.$(VERSION) $(D)$(LIBDIR)/pkgconfig/libep.pc

install: all
	$(Q)mkdir -p '$(D)$(BINDIR)' '$(D)$(LIBDIR)/pkgconfig' '$(D)$(INCLUDEDIR)'
	$(if $(TOOL),$(Q)install -m 755 $(B)/ep '$(D)$(BINDIR)/ep')
	$(Q)install -m 644 include/ep.h '$(D)$(INCLUDEDIR)/ep.h'
	$(Q)install -m 644 $(B)/libep.a '$(D)$(LIBDIR)/libep.a'
	$(Q)install -m 755 $(B)/libep.so.$(VERSION) '$(D)$(LIBDIR)/libep.so.$(VERSION)'
	$(Q)ln -sf libep.so.$(VERSION) '$(D)$(LIBDIR)/libep.so.$(SOVERSION)'
	$(Q)ln -sf libep.so.$(SOVERSION) '$(D)$(LIBDIR)/libep.so'
	$(Q)install -m 644 $(B)/libep.pc '$(D)$(LIBDIR)/pkgconfig/libep.pc'

uninstall:
	$(Q)rm -f $(INSTALLED:%='%')
