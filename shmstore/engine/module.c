/* `shmstore.engine._core`: core.c for Python. The GIL is held during each call: none of them waits. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "core.h"

#include <string.h>

enum { USUAL_WORDS = 1024, MAX_NAME = 256, MAX_DEPTH = 1000 };

typedef struct {
    PyObject_HEAD
    Py_buffer memory; /* keeps the file mapped; `obj` is NULL after `close` */
    struct core core;
} Core;

/* Checked right before each operation: the conversion of an argument may run Python, and that may close the store. */
static bool is_open(const Core *self)
{
    return self->memory.obj != NULL;
}

/* A record while it is built or read: on the stack if it has a usual size. */
struct scratch {
    uint64_t usual[USUAL_WORDS];
    uint64_t *words;
};

static bool scratch_reserve(struct scratch *scratch, uint64_t length)
{
    const uint64_t words = core_capacity(length);
    scratch->words = words <= USUAL_WORDS ? scratch->usual : PyMem_Malloc(words * CORE_CELL);
    return scratch->words != NULL;
}

static void scratch_free(struct scratch *scratch)
{
    if (scratch->words != scratch->usual)
        PyMem_Free(scratch->words);
}

/* -- arguments: unusual ones are CORE_DECLINED, not an exception, and Python checks them --------------------------- */

static bool number_of(PyObject *object, uint64_t *number)
{
    *number = PyLong_AsUnsignedLongLong(object);
    if (*number != UINT64_MAX || !PyErr_Occurred())
        return true;
    PyErr_Clear();
    return false;
}

struct text {
    const char *data;
    Py_ssize_t length;
};

static bool text_of(PyObject *object, struct text *text)
{
    if (!PyUnicode_Check(object))
        return false;
    text->data = PyUnicode_AsUTF8AndSize(object, &text->length);
    if (text->data && text->length > 0 && text->length <= MAX_NAME)
        return true;
    PyErr_Clear();
    return false;
}

static struct core_key key_of_text(struct text sid)
{
    return core_key_of((const uint8_t *)sid.data, (uint64_t)sid.length);
}

static bool key_of(PyObject *sid, struct core_key *key)
{
    struct text name;
    if (!text_of(sid, &name))
        return false;
    *key = key_of_text(name);
    return true;
}

static bool bytes_of(PyObject *object, struct text *bytes)
{
    char *start;
    if (!PyBytes_Check(object) || PyBytes_AsStringAndSize(object, &start, &bytes->length))
        return false;
    bytes->data = start;
    return true;
}

static PyObject *argument_error(void)
{
    PyErr_SetString(PyExc_TypeError, "wrong arguments");
    return NULL;
}

/* -- the body of a record, see body.py ----------------------------------------------------------------------------- */

struct body {
    struct text sid, codec, owner, payload; /* owner.data: NULL without an owner; codec.length: 0 for the default one */
};

static bool split_body(const char *data, Py_ssize_t length, struct body *body)
{
    if (length < 4)
        return false;
    const uint8_t *head = (const uint8_t *)data;
    const Py_ssize_t owner = head[2] | head[3] << 8;
    body->sid = (struct text){data + 4, head[0] + 1};
    body->codec = (struct text){body->sid.data + body->sid.length, head[1]};
    body->owner = (struct text){body->codec.data + body->codec.length, owner ? owner - 1 : 0};
    body->payload.data = body->owner.data + body->owner.length;
    body->payload.length = data + length - body->payload.data;
    if (!owner)
        body->owner.data = NULL;
    return body->payload.length >= 0;
}

static uint64_t body_length(const struct body *body)
{
    return 4 + (uint64_t)(body->sid.length + body->codec.length + body->owner.length + body->payload.length);
}

static char *append(char *at, struct text text)
{
    if (text.length)
        memcpy(at, text.data, (size_t)text.length);
    return at + text.length;
}

static void join_body(char *at, const struct body *body)
{
    const uint16_t owner = body->owner.data ? (uint16_t)(body->owner.length + 1) : 0;
    at[0] = (char)(body->sid.length - 1);
    at[1] = (char)body->codec.length;
    memcpy(at + 2, &owner, 2);
    append(append(append(append(at + 4, body->sid), body->codec), body->owner), body->payload);
}

/* -- reading ----------------------------------------------------------------------------------------------------- */

static int read_record(struct core *core, struct core_key key, struct core_entry *entry, struct scratch *scratch)
{
    uint64_t room = USUAL_WORDS * CORE_CELL;
    scratch->words = scratch->usual;
    int result;
    while ((result = core_read(core, key, entry, scratch->words, room)) == CORE_LONG) {
        scratch_free(scratch);
        room = entry->length;
        if (!scratch_reserve(scratch, room)) {
            scratch->words = scratch->usual;
            return CORE_DECLINED;
        }
    }
    return result;
}

static PyObject *body_of(const struct core_entry *entry, const uint64_t *words)
{
    return PyBytes_FromStringAndSize((const char *)words + CORE_HEAD, (Py_ssize_t)(entry->length - CORE_OVERHEAD));
}

/* Build a `reader.Entry`. */
static PyObject *entry_of(const struct core_entry *entry, const uint64_t *words)
{
    return Py_BuildValue(
        "KKK(IIKKKL)y#", entry->slot, entry->version, entry->expires, (unsigned int)words[0],
        (unsigned int)(words[0] >> 32), words[1], words[2], words[3], (long long)words[4], (const char *)words,
        (Py_ssize_t)entry->length);
}

PyDoc_STRVAR(read_doc, "read(low, high): the `Entry` of a key, expired or not; None: there is none; int: see core.py.");

static PyObject *core_method_read(Core *self, PyObject *const *arguments, Py_ssize_t count)
{
    struct core_key key;
    struct core_entry entry;
    struct scratch scratch;
    if (count != 2)
        return argument_error();
    if (!number_of(arguments[0], &key.low) || !number_of(arguments[1], &key.high) || !is_open(self))
        return PyLong_FromLong(CORE_DECLINED);
    const int result = read_record(&self->core, key, &entry, &scratch);
    PyObject *answer = result == CORE_OK ? entry_of(&entry, scratch.words)
        : result == CORE_NO             ? Py_NewRef(Py_None)
                                        : PyLong_FromLong(result);
    scratch_free(&scratch);
    return answer;
}

typedef PyObject *(*Answer)(const struct core_entry *, const uint64_t *);

/* Read a live session; with `counted`, count that and refresh its place in the order of use. */
static PyObject *look_up(Core *self, PyObject *sid, PyObject *clock, bool counted, Answer answer_of)
{
    struct core *core = &self->core;
    struct core_key key;
    struct core_entry entry;
    struct scratch scratch;
    uint64_t now;
    if (!key_of(sid, &key) || !number_of(clock, &now) || !is_open(self) || (counted && !core->row))
        return PyLong_FromLong(CORE_DECLINED);
    int result = read_record(core, key, &entry, &scratch);
    if (result == CORE_OK && entry.expires <= now)
        result = CORE_NO;
    if (result == CORE_OK && counted)
        result = core_use(core, &entry, now);
    if (counted && result >= 0) /* before `answer_of`: what Python allocates may run a finalizer, which may close */
        core_count_read(core, result == CORE_OK);
    PyObject *answer = result == CORE_OK ? answer_of(&entry, scratch.words)
        : result == CORE_NO             ? Py_NewRef(Py_None)
                                        : PyLong_FromLong(result);
    scratch_free(&scratch);
    return answer;
}

PyDoc_STRVAR(get_doc, "get(sid, now, counted): the body of a live session; None: there is none; int: see core.py.");

static PyObject *core_method_get(Core *self, PyObject *const *arguments, Py_ssize_t count)
{
    return count == 3 ? look_up(self, arguments[0], arguments[1], arguments[2] == Py_True, body_of) : argument_error();
}

static PyObject *loaded_of(const struct core_entry *entry, const uint64_t *words)
{
    struct body body;
    PyObject *payload = NULL, *owner = NULL;
    if (split_body((const char *)words + CORE_HEAD, (Py_ssize_t)(entry->length - CORE_OVERHEAD), &body)
        && !body.codec.length) {
        owner = body.owner.data ? PyUnicode_DecodeUTF8(body.owner.data, body.owner.length, NULL) : Py_NewRef(Py_None);
        if (owner)
            payload = PyBytes_FromStringAndSize(body.payload.data, body.payload.length);
        else
            PyErr_Clear();
    }
    PyObject *answer = PyErr_Occurred() ? NULL : entry_of(entry, words);
    if (answer)
        return Py_BuildValue(
            "NKNN", answer, entry->used, payload ? payload : Py_NewRef(Py_None), owner ? owner : Py_NewRef(Py_None));
    Py_XDECREF(payload);
    Py_XDECREF(owner);
    return NULL;
}

PyDoc_STRVAR(
    load_doc, "load(sid, now): like get, counted; returns the `Entry`, when it was used before, and the payload and\n"
              "the owner in its body; payload None: the body is damaged, or of another codec.");

static PyObject *core_method_load(Core *self, PyObject *const *arguments, Py_ssize_t count)
{
    return count == 2 ? look_up(self, arguments[0], arguments[1], true, loaded_of) : argument_error();
}

/* -- writing ----------------------------------------------------------------------------------------------------- */

PyDoc_STRVAR(
    put_doc, "put(sid, owner, payload, span, weight, present, now): write a whole session of the default codec;\n"
             "0: it was not written; n: it was, and n - 1 live sessions were evicted; negative: see core.py.");

/* Build a record; false: it does not fit. */
static bool build_record(
    struct core_record *record, struct scratch *scratch, struct core_key key, const struct body *body, uint64_t created)
{
    record->length = CORE_OVERHEAD + body_length(body);
    if (record->length > UINT32_MAX || !scratch_reserve(scratch, record->length))
        return false;
    record->words = scratch->words;
    join_body((char *)scratch->words + CORE_HEAD, body);
    core_seal(scratch->words, key, record->owner, created, record->weight, record->length);
    return true;
}

/* Take a new owner: a str, or None. */
static bool owner_of(PyObject *object, struct text *owner, uint64_t *digest)
{
    if (object == Py_None) {
        *owner = (struct text){NULL, 0};
        *digest = 0;
        return true;
    }
    if (!text_of(object, owner))
        return false;
    *digest = core_owner_digest((const uint8_t *)owner->data, (uint64_t)owner->length);
    return true;
}

static bool weight_of(PyObject *object, uint32_t *weight)
{
    uint64_t number;
    if (!number_of(object, &number) || number > UINT32_MAX)
        return false;
    *weight = (uint32_t)number;
    return true;
}

static PyObject *core_method_put(Core *self, PyObject *const *arguments, Py_ssize_t count)
{
    struct core_record record;
    struct scratch scratch;
    struct body body = {.codec = {NULL, 0}};
    uint64_t span, now;
    if (count != 7)
        return argument_error();
    if (!text_of(arguments[0], &body.sid) || !owner_of(arguments[1], &body.owner, &record.owner)
        || !bytes_of(arguments[2], &body.payload) || !number_of(arguments[3], &span)
        || !weight_of(arguments[4], &record.weight) || !number_of(arguments[6], &now) || !is_open(self)
        || !core_allows(&self->core, (uint64_t)body.payload.length))
        return PyLong_FromLong(CORE_DECLINED);
    const int present = arguments[5] == Py_None ? -1 : arguments[5] == Py_True;
    const struct core_key key = key_of_text(body.sid);
    core_prefetch(&self->core, key);
    if (!build_record(&record, &scratch, key, &body, now))
        return PyLong_FromLong(CORE_DECLINED);
    const int result = core_put(&self->core, key, &record, present, span, now);
    scratch_free(&scratch);
    return PyLong_FromLong(result);
}

/* Take an `Entry`: (slot, version, expires, (length, weight, low, high, owner, created), record). */
static bool take_entry(
    PyObject *entry, struct core_exchange *change, uint64_t *owner, uint64_t *created, struct body *body)
{
    struct text record;
    PyObject *head = PyTuple_Check(entry) && PyTuple_Size(entry) == 5 ? PyTuple_GetItem(entry, 3) : NULL;
    if (!head || !PyTuple_Check(head) || PyTuple_Size(head) != 6)
        return false;
    *created = (uint64_t)PyLong_AsLongLong(PyTuple_GetItem(head, 5)); /* before the boot it is negative */
    if (PyErr_Occurred()) {
        PyErr_Clear();
        return false;
    }
    return number_of(PyTuple_GetItem(entry, 0), &change->slot) && number_of(PyTuple_GetItem(entry, 1), &change->version)
        && number_of(PyTuple_GetItem(head, 2), &change->old_key.low)
        && number_of(PyTuple_GetItem(head, 3), &change->old_key.high) && number_of(PyTuple_GetItem(head, 4), owner)
        && bytes_of(PyTuple_GetItem(entry, 4), &record) && record.length >= CORE_OVERHEAD
        && split_body(record.data + CORE_HEAD, record.length - CORE_OVERHEAD, body);
}

PyDoc_STRVAR(
    exchange_doc,
    "exchange(entry, sid, owner, payload, weight, span, count, tombstone, now): write a session that was read as\n"
    "`entry`. sid: None, or another id; owner: a str, None, or KEEP; span: None keeps the deadline. Returns as put.");

static PyObject *core_method_exchange(Core *self, PyObject *const *arguments, Py_ssize_t count)
{
    struct core_exchange change;
    struct core_record record;
    struct scratch scratch;
    struct body body;
    uint64_t created, now;
    if (count != 9)
        return argument_error();
    const bool renames = arguments[1] != Py_None, has_owner = arguments[2] == Py_None || PyUnicode_Check(arguments[2]);
    change.keeps_deadline = arguments[5] == Py_None;
    change.tombstone = arguments[7] == Py_True;
    if (!take_entry(arguments[0], &change, &record.owner, &created, &body)
        || (renames && !text_of(arguments[1], &body.sid))
        || (has_owner && !owner_of(arguments[2], &body.owner, &record.owner))
        || !bytes_of(arguments[3], &body.payload) || !weight_of(arguments[4], &record.weight)
        || (!change.keeps_deadline && !number_of(arguments[5], &change.span))
        || !number_of(arguments[6], &change.count) || change.count >= self->core.first_slot
        || !number_of(arguments[8], &now) || !is_open(self))
        return PyLong_FromLong(CORE_DECLINED);
    change.new_key = renames ? key_of_text(body.sid) : change.old_key;
    if (!build_record(&record, &scratch, change.new_key, &body, created))
        return PyLong_FromLong(CORE_DECLINED);
    const int result = core_exchange(&self->core, &change, &record, now);
    scratch_free(&scratch);
    return PyLong_FromLong(result);
}

PyDoc_STRVAR(touch_doc, "touch(sid, span, now): give a session another deadline; 1, 0: absent, negative: see core.py.");

static PyObject *core_method_touch(Core *self, PyObject *const *arguments, Py_ssize_t count)
{
    struct core_key key;
    uint64_t span, now;
    if (count != 3)
        return argument_error();
    if (!key_of(arguments[0], &key) || !number_of(arguments[1], &span) || !number_of(arguments[2], &now)
        || !is_open(self))
        return PyLong_FromLong(CORE_DECLINED);
    return PyLong_FromLong(core_touch(&self->core, key, span, now));
}

PyDoc_STRVAR(drop_doc, "drop(sid, tombstone, now): remove a session; 1, 0: none was live, negative: see core.py.");

static PyObject *core_method_drop(Core *self, PyObject *const *arguments, Py_ssize_t count)
{
    struct core_key key;
    uint64_t now;
    if (count != 3)
        return argument_error();
    if (!key_of(arguments[0], &key) || !number_of(arguments[2], &now) || !is_open(self))
        return PyLong_FromLong(CORE_DECLINED);
    return PyLong_FromLong(core_drop(&self->core, key, arguments[1] == Py_True, now));
}

/* -- the type and the module --------------------------------------------------------------------------------------- */

PyDoc_STRVAR(
    count_in_doc, "count_in(row): from now on count reads and waits in this row of counters, named by its first cell;\n"
                  "0: in none. ValueError: it is not between the journal and the slots.");

static PyObject *core_method_count_in(Core *self, PyObject *const *arguments, Py_ssize_t count)
{
    uint64_t row;
    if (count != 1)
        return argument_error();
    if (!number_of(arguments[0], &row) || !core_count_in(&self->core, row)) {
        PyErr_SetString(PyExc_ValueError, "not a row of counters");
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(close_doc, "close(): let go of the memory; each later call that uses it returns DECLINED.");

static PyObject *core_method_close(Core *self, PyObject *const *Py_UNUSED(arguments), Py_ssize_t count)
{
    if (count)
        return argument_error();
    PyBuffer_Release(&self->memory); /* sets `obj` to NULL */
    Py_RETURN_NONE;
}

static PyObject *core_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    PyObject *memory;
    struct core core = {.row = 0};
    unsigned long long mutex, word, n[15];
    if (keywords && PyDict_Size(keywords))
        return argument_error();
    if (!PyArg_ParseTuple(
            arguments, "OKKI(KKKKKKKKKKKKKKK)", &memory, &mutex, &word, &core.locked_once, &n[0], &n[1], &n[2], &n[3],
            &n[4], &n[5], &n[6], &n[7], &n[8], &n[9], &n[10], &n[11], &n[12], &n[13], &n[14]))
        return NULL;
    core.slots = n[0], core.blocks = n[1], core.block_size = n[2], core.shortest = n[3], core.buckets = n[4];
    core.owner_buckets = n[5], core.tombstone_sets = n[6], core.first_slot = n[7], core.first_bucket = n[8];
    core.first_owner = n[9], core.first_tombstone = n[10], core.first_block = n[11], core.step = n[12];
    core.last_slot = n[13], core.owned_list = n[14];
    Py_buffer view;
    if (PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE))
        return NULL;
    if ((uintptr_t)view.buf % CORE_CELL || mutex % CORE_CELL || mutex > 4096 || word > 9
        || !core_fits(&core, (uint64_t)view.len / CORE_CELL)) {
        PyBuffer_Release(&view);
        PyErr_SetString(PyExc_ValueError, "the regions do not fit in the memory");
        return NULL;
    }
    Core *self = (Core *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self) {
        PyBuffer_Release(&view);
        return NULL;
    }
    core.cells = view.buf;
    core.mutex = (pthread_mutex_t *)((char *)view.buf + mutex);
    core.depth = (const uint32_t *)core.mutex + word;
    self->memory = view;
    self->core = core;
    return (PyObject *)self;
}

static void core_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyBuffer_Release(&((Core *)self)->memory);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

#define METHOD(name)                                                                                                   \
    {                                                                                                                  \
        #name, (PyCFunction)(void (*)(void))core_method_##name, METH_FASTCALL, name##_doc                              \
    }

static PyMethodDef core_methods[] = {
    METHOD(read), METHOD(get), METHOD(load), METHOD(put), METHOD(exchange), METHOD(touch), METHOD(drop), METHOD(count_in),
    METHOD(close), {0},
};

static PyType_Slot core_slots[] = {
    {Py_tp_doc, "One arena, see core.py: Core(memory, mutex, depth_word, locked_once, geometry)."},
    {Py_tp_new, core_new},
    {Py_tp_dealloc, core_dealloc},
    {Py_tp_methods, core_methods},
    {0, NULL},
};

static PyType_Spec core_spec = {
    .name = "shmstore.engine._core.Core",
    .basicsize = sizeof(Core),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = core_slots,
};

static int module_exec(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&core_spec), *interface = PyTuple_New(CORE_NUMBERS);
    int failed = !type || !interface;
    for (Py_ssize_t i = 0; !failed && i < CORE_NUMBERS; i++) {
        PyObject *number = PyLong_FromUnsignedLongLong(core_interface[i]);
        failed = !number || PyTuple_SetItem(interface, i, number);
    }
    failed = failed || PyModule_AddObjectRef(module, "Core", type)
        || PyModule_AddObjectRef(module, "INTERFACE", interface);
    Py_XDECREF(type);
    Py_XDECREF(interface);
    return failed ? -1 : 0;
}

/* -- values ------------------------------------------------------------------------------------------------------ */

/* Whether msgspec encodes a value without loss; `depth` containers may be opened. No code of Python runs. */
static bool is_plain(PyObject *value, long depth)
{
    if (value == Py_None || PyUnicode_CheckExact(value) || PyBool_Check(value) || PyFloat_CheckExact(value)
        || PyBytes_CheckExact(value) || PyByteArray_CheckExact(value))
        return true;
    if (PyLong_CheckExact(value)) {
        int overflow;
        uint64_t number;
        PyLong_AsLongLongAndOverflow(value, &overflow);
        return !overflow || (overflow > 0 && number_of(value, &number));
    }
    if (depth <= 0)
        return false;
    if (PyDict_CheckExact(value)) {
        PyObject *key, *item;
        for (Py_ssize_t at = 0; PyDict_Next(value, &at, &key, &item);)
            if (!PyUnicode_CheckExact(key) || !is_plain(item, depth - 1))
                return false;
        return true;
    }
    if (PyList_CheckExact(value)) {
        for (Py_ssize_t at = 0; at < PyList_Size(value); at++)
            if (!is_plain(PyList_GetItem(value, at), depth - 1))
                return false;
        return true;
    }
    return false;
}

PyDoc_STRVAR(
    is_plain_doc, "is_plain(value, depth): whether a value needs no tag: it consists of None, bool, int of 64 bits,\n"
                  "float, str, bytes, bytearray, list and dict with str keys, no subclasses,\n"
                  "nested at most `depth` levels.");

static PyObject *module_is_plain(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t count)
{
    uint64_t depth;
    if (count != 2)
        return argument_error();
    if (!number_of(arguments[1], &depth))
        Py_RETURN_FALSE;
    return PyBool_FromLong(is_plain(arguments[0], depth < MAX_DEPTH ? (long)depth : MAX_DEPTH));
}

static PyMethodDef module_methods[] = {
    {"is_plain", (PyCFunction)(void (*)(void))module_is_plain, METH_FASTCALL, is_plain_doc},
    {0},
};

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shmstore.engine._core",
    .m_doc = "The operations of an arena in C.",
    .m_methods = module_methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&module);
}
