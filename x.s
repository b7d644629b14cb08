.intel_syntax noprefix
.set SYSTEM_CALL, 8
.set SE, 1024
.set PR, 16384
.set SCV_LEVEL, 7
.set RFSCV_LEVEL, 8
.set NOTHING_LEVEL, 6
.set TLBIEL_LEVEL, 32
.set IS, 3072
.set SET, 16773120
.set IR, 32
.set DR, 16
.set ME, 4096
.set S_BIT, 22
.set FSCR_SCV, 4096
.set SRR0, 26
.set SRR1, 27
.set FSCR, 153
.set REG_MSR, 77
.set REG_LR, 74
.set REG_CTR, 76
.set LEVEL, 0
.set MSR, 8
.set PC, 16
.set GPRS, 24
.set SPRS, 32
.set WRITE, 40
.set READ, 48
.set PYTHON, 56
.set FROM_MSR, 64
.set SECURE, 72
.set KEPT_BY_SC, 80
.set KEPT_BY_SCV, 88
.set SC_ENTRY, 96
.set SCV_ENTRY, 128
L0:
cmp esi, SYSTEM_CALL
L1:
jne python
L2:
mov rax, [rdx+LEVEL]
L3:
mov eax, [rax]
L4:
mov rcx, [rdx+MSR]
L5:
mov r8, [rcx]
L6:
test r8d, SE 
L7:
jnz python
L8:
test eax, eax
L9:
jz sc
L10:
cmp eax, SCV_LEVEL
L11:
je scv
L12:
test r8d, PR 
L13:
jnz python
L14:
cmp eax, NOTHING_LEVEL
L15:
je out
L16:
cmp eax, RFSCV_LEVEL
L17:
je rfscv
L18:
sub eax, TLBIEL_LEVEL
L19:
cmp eax, 32
L20:
jae python
L21:
mov rcx, [rdx+GPRS]
L22:
mov rax, [rcx+rax*8] 
L23:
test eax, IS 
L24:
jz python
L25:
test eax, SET 
L26:
jz python
L27:
out: ret
L28:
python: jmp [rdx+PYTHON]
L29:
sc: mov r9, [rdx+SPRS]
L30:
mov rcx, [rdx+PC]
L31:
mov rax, [rcx]
L32:
mov [r9+SRR0*8], rax
L33:
mov rax, r8
L34:
and rax, [rdx+FROM_MSR]
L35:
or rax, [rdx+SECURE]
L36:
mov [r9+SRR1*8], rax
L37:
mov rcx, r8
L38:
and r8, [rdx+KEPT_BY_SC]
L39:
lea r9, [rdx+SC_ENTRY]
L40:
enter: and ecx, IR|DR 
L41:
cmp ecx, IR|DR
L42:
jne real
L43:
add r9, 16
L44:
real: or r8, [r9]
L45:
mov rax, [r9+8]
L46:
mov rcx, [rdx+PC]
L47:
mov [rcx], rax
L48:
push r8
L49:
mov rax, [rdx+WRITE]
L50:
mov esi, REG_MSR
L51:
mov rdx, rsp
L52:
call rax
L53:
pop rax
L54:
ret
L55:
scv: mov r9, [rdx+SPRS]
L56:
test dword ptr [r9+FSCR*8], FSCR_SCV
L57:
jz python
L58:
push rbx
L59:
push r12
L60:
push r13
L61:
sub rsp, 16
L62:
mov rbx, rdx
L63:
mov r12, rdi
L64:
mov r13, r8
L65:
mov esi, REG_LR 
L66:
mov rdx, [rbx+PC]
L67:
call [rbx+WRITE]
L68:
mov rax, r13
L69:
and rax, [rbx+FROM_MSR]
L70:
or rax, [rbx+SECURE]
L71:
mov [rsp], rax
L72:
mov rdi, r12
L73:
mov esi, REG_CTR 
L74:
mov rdx, rsp
L75:
call [rbx+WRITE]
L76:
mov rdi, r12
L77:
mov rdx, rbx
L78:
mov rcx, r13
L79:
mov r8, r13
L80:
add rsp, 16
L81:
pop r13
L82:
pop r12
L83:
pop rbx
L84:
and r8, [rdx+KEPT_BY_SCV]
L85:
lea r9, [rdx+SCV_ENTRY]
L86:
jmp enter
L87:
rfscv: push rbx
L88:
push r12
L89:
push r13
L90:
sub rsp, 16
L91:
mov rbx, rdx
L92:
mov r12, rdi
L93:
mov r13, r8
L94:
mov esi, REG_LR
L95:
mov rdx, rsp
L96:
call [rbx+READ]
L97:
mov rax, [rsp]
L98:
and rax, -4
L99:
mov rcx, [rbx+PC]
L100:
mov [rcx], rax
L101:
mov rdi, r12
L102:
mov esi, REG_CTR
L103:
mov rdx, rsp
L104:
call [rbx+READ]
L105:
mov rax, [rsp]
L106:
btr rax, S_BIT
L107:
and r13d, ME
L108:
or rax, r13
L109:
mov [rsp], rax
L110:
mov rdi, r12
L111:
mov esi, REG_MSR
L112:
mov rdx, rsp
L113:
call [rbx+WRITE]
L114:
add rsp, 16
L115:
pop r13
L116:
pop r12
L117:
pop rbx
L118:
ret
